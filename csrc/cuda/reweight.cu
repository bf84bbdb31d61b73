// One warp per pool. Lane l walks the prompts l, l + 32, ...; sums run in a fixed order.
#include "../reweight_args.h"
#include "launch.h"

namespace sapo {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr unsigned kAll = 0xffffffffu;

__device__ double warp_sum(double value) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    value = value + __shfl_down_sync(kAll, value, half);
  }
  return __shfl_sync(kAll, value, 0);
}

__global__ void __launch_bounds__(kWarps* kLanes) reweight_kernel(Reweight a) {
  const int64_t pool = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (pool >= a.pools) {
    return;
  }
  const int lane = threadIdx.x % kLanes;
  const int64_t begin = pool * a.prompts, end = begin + a.prompts;

  double low = INFINITY, live = 0;
  int64_t best = end;
  for (int64_t k = begin + lane; k < end; k += kLanes) {
    update(a, k);
    if (usable(a, k)) {
      live += 1;
      if (a.mean[k] < low) {
        low = a.mean[k];
        best = k;
      }
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
    total += a.probs[k] = soft(a, k, best, low);
  }
  const double scale = (1.0 - a.floor) / warp_sum(total), base = a.floor / live;
  double squares = 0;
  for (int64_t k = begin + lane; k < end; k += kLanes) {
    const double p = usable(a, k) ? scale * a.probs[k] + base : 0.0;
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

void run_cuda(const Reweight& a, void* stream) {
  if (a.pools == 0) {
    return;
  }
  launch(reweight_kernel, (a.pools + kWarps - 1) / kWarps, kWarps * kLanes, stream, a, "reweight_");
}

}  // namespace sapo
