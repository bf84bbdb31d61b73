// What reweight_ works on, without torch: raw pointers for the CPU and the CUDA kernel. The operator's contract is
// documented in sapo_kernels/reweight/api.py.
#pragma once

#include "portable_math.h"

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

// The running mean and weight of prompts after `tokens` new response tokens with summed loss `nll`. Number is a double
// or a vector of them; without branches both give the same bits.
template <typename Number>
SAPO_HOST_DEVICE void update(Number& mean, Number& weight, Number nll, Number tokens, double decay) {
  const Number zero = {};
  const Number aged = decay * weight;
  const auto finite = is_finite(nll);
  const auto valid = (tokens > 0.0) & finite;
  // The first evidence, or the first after a loss that was not finite, stands alone.
  const auto kept = (aged > 0.0) & is_finite(mean);
  const Number total = tokens + (kept ? aged : zero);
  const Number before = kept ? mean : zero;
  const Number moved = before + (nll - tokens * before) / total;
  const Number broken = finite ? zero + __builtin_nan("") : nll;
  const auto scored = tokens != 0.0;
  mean = scored ? (valid ? moved : broken) : mean;
  weight = scored ? (valid ? total : zero) : aged;
}

void reweight_cpu(const Reweight& a);
// Enqueues one kernel on `stream` (a cudaStream_t) of the current device.
void reweight_cuda(const Reweight& a, void* stream);

}  // namespace sapo
