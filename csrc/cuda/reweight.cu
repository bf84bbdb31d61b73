// One warp per pool. Lane l walks the prompts l, l + 32, ..., so sums run in the order that portable_math.h fixes.
#include "../reweight_args.h"
#include "launch.h"

namespace sapo {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kAll = 0xffffffffu;

__device__ double warp_sum(double value) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    value = value + __shfl_down_sync(kAll, value, half);
  }
  return __shfl_sync(kAll, value, 0);
}

__device__ double candidate(const Reweight& a, int64_t k) {
  return a.live[k] ? a.mean[k] : __longlong_as_double(0x7ff0000000000000LL);
}

__global__ void __launch_bounds__(kWarps* kLanes) reweight_kernel(Reweight a) {
  const int64_t pool = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (pool >= a.pools) {
    return;
  }
  const int lane = threadIdx.x % kLanes;
  const int64_t begin = pool * a.prompts, end = begin + a.prompts;

  double low = __longlong_as_double(0x7ff0000000000000LL), live = 0;
  int64_t best = end;
  for (int64_t k = begin + lane; k < end; k += kLanes) {
    double mean = a.mean[k], weight = a.weight[k];
    update(mean, weight, a.nll[k], static_cast<double>(a.tokens[k]), a.decay);
    a.mean[k] = mean;
    a.weight[k] = weight;
    const bool usable = a.live[k] && is_finite(mean);
    live += usable ? 1.0 : 0.0;
    if (usable && mean < low) {
      low = mean;
      best = k;
    }
  }
  live = warp_sum(live);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAll, low, step);
    const int64_t other_best = __shfl_xor_sync(kAll, best, step);
    if (other < low || (other == low && other_best < best)) {
      low = other;
      best = other_best;
    }
  }
  if (live == 0) {
    if (lane == 0) {
      a.best[pool] = -1;
    }
    return;
  }

  double total = 0;
  for (int64_t k = begin + lane; k < end; k += kLanes) {
    const double mean = candidate(a, k);
    const double soft = is_finite(mean) ? exp_nonpositive((low - mean) * a.inverse_temperature) : 0.0;
    const double e = a.inverse_temperature == 0 ? (k == best ? 1.0 : 0.0) : soft;
    a.probs[k] = e;
    total += e;
  }
  const double inverse = 1.0 / warp_sum(total), keep = 1.0 - a.floor, base = a.floor / live;
  double squares = 0;
  for (int64_t k = begin + lane; k < end; k += kLanes) {
    const double p = is_finite(candidate(a, k)) ? keep * (a.probs[k] * inverse) + base : 0.0;
    a.probs[k] = p;
    squares += p * p;
  }
  squares = warp_sum(squares);
  if (lane == 0) {
    a.best[pool] = best - begin;
    a.effective[pool] = 1.0 / squares;
  }
}

}  // namespace

void reweight_cuda(const Reweight& a, void* stream) {
  if (a.pools == 0) {
    return;
  }
  launch(reweight_kernel, (a.pools + kWarps - 1) / kWarps, kWarps * kLanes, stream, a, "reweight_");
}

}  // namespace sapo
