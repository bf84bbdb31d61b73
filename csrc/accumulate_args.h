// What accumulate_ works on, without torch: raw pointers for the CPU and the CUDA kernel. The operator's contract is
// documented in sapo_kernels/accumulate/api.py.
#pragma once

#include <cstdint>

namespace sapo {

// C cells, E list entries, a piece of N targets.
template <typename Real>
struct Accumulate {
  double* nll;                 // [C] sums so far in nats
  int64_t* tokens;             // [C] entries added so far
  const Real* logprob;         // [N] of the targets start .. start + N - 1
  const int64_t* cell_target;  // [E] the targets of all cells end to end
  const int64_t* cell_ptr;     // [C + 1] where each cell's begin
  int64_t cells;
  int64_t entries;
  int64_t start;
  int64_t count;
};

template <typename Real>
void run_cpu(const Accumulate<Real>& a);
// Enqueues one kernel on `stream` (a cudaStream_t) of the current device.
template <typename Real>
void run_cuda(const Accumulate<Real>& a, void* stream);

}  // namespace sapo
