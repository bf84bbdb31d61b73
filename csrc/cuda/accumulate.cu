// One thread per cell, which adds its own rows in their own order: no atomics, and the bits of a cell are its own.
#include "../accumulate_args.h"
#include "launch.h"

namespace sapo {
namespace {

constexpr int kThreads = 128;

// A kernel cannot raise without a wait for the device. Lists that do not fit together make the cell NaN, which is seen
// by whoever reads it and can never be selected; nothing is read out of range.
template <typename Real>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(Accumulate<Real> a) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (cell >= a.cells) {
    return;
  }
  const int64_t begin = a.cell_ptr[cell], end = a.cell_ptr[cell + 1], done = a.tokens[cell];
  bool fits = 0 <= begin && begin <= end && end <= a.entries && 0 <= done && done <= end - begin;
  double sum = a.nll[cell];
  int64_t e = fits ? begin + done : end;
  for (; e < end; ++e) {
    const int64_t target = a.cell_target[e];
    if (target < a.start) {
      fits = false;
      break;
    }
    if (target - a.start >= a.count) {
      break;
    }
    sum -= static_cast<double>(a.logprob[target - a.start]);
  }
  if (!fits) {
    a.nll[cell] = __longlong_as_double(0x7ff8000000000000LL);
  } else if (e > begin + done) {
    a.nll[cell] = sum;
    a.tokens[cell] = e - begin;
  }
}

}  // namespace

template <typename Real>
void run_cuda(const Accumulate<Real>& a, void* stream) {
  if (a.cells == 0) {
    return;
  }
  launch(accumulate_kernel<Real>, (a.cells + kThreads - 1) / kThreads, kThreads, stream, a, "accumulate_");
}

template void run_cuda(const Accumulate<float>&, void*);
template void run_cuda(const Accumulate<double>&, void*);

}  // namespace sapo
