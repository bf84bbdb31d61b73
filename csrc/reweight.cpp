#include "reweight_args.h"

namespace sapo {

void run_cpu(const Reweight& a) {
  for (int64_t pool = 0; pool < a.pools; ++pool) {
    const int64_t begin = pool * a.prompts, end = begin + a.prompts;
    int64_t best = -1;
    double low = 0, live = 0;
    for (int64_t k = begin; k < end; ++k) {
      update(a, k);
      if (!usable(a, k)) continue;
      live += 1;
      const double mean = a.mean[k];
      if (best < 0 || mean < low) {
        low = mean;
        best = k;
      }
    }
    a.best[pool] = best < 0 ? -1 : best - begin;
    if (best < 0) continue;

    double total = 0, squares = 0;
    for (int64_t k = begin; k < end; ++k) total += a.probs[k] = soft(a, k, best, low);
    const double scale = (1.0 - a.floor) / total, base = a.floor / live;
    for (int64_t k = begin; k < end; ++k) {
      const double p = usable(a, k) ? scale * a.probs[k] + base : 0.0;
      a.probs[k] = p;
      squares += p * p;
    }
    a.effective[pool] = 1.0 / squares;
  }
}

}  // namespace sapo
