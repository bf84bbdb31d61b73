// What reweight_ works on, without torch: raw pointers for the CPU and the CUDA kernel. The operator's contract is
// documented in sapo_kernels/reweight/api.py.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SAPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SAPO_HOST_DEVICE inline
#endif

namespace sapo {

// P pools of K prompts; all arrays dense, [P, K] unless said otherwise.
struct Reweight {
  double* mean;           // discounted mean loss per token in nats; not finite: never selected
  double* weight;         // discounted number of tokens behind the mean
  double* probs;          // weights to sample prompts by
  int64_t* best;          // [P] index of the lowest mean, -1: none
  double* effective;      // [P] effective number of prompts, 1 / sum(probs^2)
  const uint8_t* live;    // false: the pool has no such prompt, or it has left the race
  const double* nll;      // summed over the newly scored examples
  const int64_t* tokens;  // response tokens behind nll; 0: not scored now
  int64_t pools;
  int64_t prompts;
  double decay;
  double inverse_temperature;  // 0: argmin
  double floor;
};

SAPO_HOST_DEVICE bool is_finite(double x) { return fabs(x) <= DBL_MAX; }

// The running mean and weight of prompt k after its new response tokens.
SAPO_HOST_DEVICE void update(const Reweight& a, int64_t k) {
  const double aged = a.decay * a.weight[k], nll = a.nll[k], tokens = static_cast<double>(a.tokens[k]);
  double mean = a.mean[k], weight = aged;
  if (tokens < 0 || (tokens > 0 && !is_finite(nll))) {
    mean = is_finite(nll) ? NAN : nll;
    weight = 0;
  } else if (tokens > 0) {
    // The first evidence, or the first after a loss that was not finite, stands alone.
    const bool kept = aged > 0 && is_finite(mean);
    weight = kept ? aged + tokens : tokens;
    mean = kept ? mean + (nll - tokens * mean) / weight : nll / tokens;
  }
  a.mean[k] = mean;
  a.weight[k] = weight;
}

SAPO_HOST_DEVICE bool usable(const Reweight& a, int64_t k) { return a.live[k] && is_finite(a.mean[k]); }

// What prompt k weighs beside the best one, whose weight is 1 and whose mean is `low`.
SAPO_HOST_DEVICE double soft(const Reweight& a, int64_t k, int64_t best, double low) {
  if (a.inverse_temperature == 0) return k == best ? 1.0 : 0.0;
  return usable(a, k) ? exp((low - a.mean[k]) * a.inverse_temperature) : 0.0;
}

void run_cpu(const Reweight& a);
// Enqueues one kernel on `stream` (a cudaStream_t) of the current device.
void run_cuda(const Reweight& a, void* stream);

}  // namespace sapo
