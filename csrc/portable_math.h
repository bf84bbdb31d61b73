// Arithmetic that gives the same bits on a CPU, on a GPU and in plain torch: only IEEE +, -, *, / and comparisons in a
// fixed order. Compile with -ffp-contract=off (g++) or --fmad=false (nvcc); sapo_kernels/reweight/torch.py mirrors it.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SAPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SAPO_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sapo {

// Sums run over this many lanes: element k goes to lane k % kLanes in ascending k, then the lanes are halved, the
// upper half added to the lower one. A warp does it with shuffles, a CPU in vector registers.
constexpr int kLanes = 32;

// Number, below, is a double or a GCC vector of them.
template <typename Number>
struct Bits {
  using type = uint64_t;
};

#ifndef __CUDACC__
typedef double Doubles2 __attribute__((vector_size(16)));
typedef double Doubles4 __attribute__((vector_size(32)));
template <>
struct Bits<Doubles2> {
  typedef uint64_t type __attribute__((vector_size(16)));
};
template <>
struct Bits<Doubles4> {
  typedef uint64_t type __attribute__((vector_size(32)));
};
#endif

template <typename Number>
SAPO_HOST_DEVICE auto is_finite(Number x) {
  return (x < 0.0 ? -x : x) <= DBL_MAX;
}

// exp(x) for x <= 0 within 1 ulp; 0 below -708, where exp is smaller than 4e-308.
template <typename Number>
SAPO_HOST_DEVICE Number exp_nonpositive(Number x) {
  // x = n * ln 2 + r, |r| <= 0.35. Adding 1.5 * 2^52 rounds to the nearest integer and leaves it in the low bits.
  const double magic = 6755399441055744.0;
  const Number shifted = x * 1.4426950408889634 + magic;
  const Number n = shifted - magic;
  const Number r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Number p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  typename Bits<Number>::type bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023) << 52;
  Number power;
  memcpy(&power, &bits, sizeof power);
  const Number zero = {};
  return x < -708.0 ? zero : p * power;
}

}  // namespace sapo
