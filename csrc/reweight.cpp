#include <algorithm>
#include <limits>

#include "reweight_args.h"

namespace sapo {
namespace {

#define SAPO_INLINE inline __attribute__((always_inline))

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// memcpy of `count` values, with the usual count known to the compiler.
template <typename Value>
SAPO_INLINE void copy(Value* to, const Value* from, int count) {
  if (count == kLanes) {
    std::memcpy(to, from, kLanes * sizeof(Value));
  } else {
    std::memcpy(to, from, count * sizeof(Value));
  }
}

// kLanes numbers in vector registers of type Doubles. The width changes the speed, never a bit.
template <typename Doubles>
struct Lanes {
  static constexpr int kWidth = sizeof(Doubles) / sizeof(double);
  static constexpr int kVectors = kLanes / kWidth;
  Doubles part[kVectors];

  SAPO_INLINE explicit Lanes(double value) {
    for (Doubles& p : part) p = Doubles{} + value;
  }
  // The numbers values[0 .. count - 1]; `missing` in the lanes beyond.
  SAPO_INLINE Lanes(const double* values, int count, double missing) : Lanes(missing) {
    copy(reinterpret_cast<double*>(part), values, count);
  }
  SAPO_INLINE void store(double* values, int count) const {
    copy(values, reinterpret_cast<const double*>(part), count);
  }

  // combine() of all lanes in the fixed order: the upper half into the lower one, until one is left.
  template <typename Combine>
  SAPO_INLINE double fold(const Combine& combine) const {
    Doubles half[kVectors];
    std::memcpy(half, part, sizeof half);
    for (int n = kVectors / 2; n > 0; n /= 2) {
      for (int v = 0; v < n; ++v) half[v] = combine(half[v], half[v + n]);
    }
    double value[kWidth];
    for (int l = 0; l < kWidth; ++l) value[l] = half[0][l];
    for (int n = kWidth / 2; n > 0; n /= 2) {
      for (int l = 0; l < n; ++l) value[l] = combine(value[l], value[l + n]);
    }
    return value[0];
  }
  SAPO_INLINE double sum() const {
    return fold([](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
  SAPO_INLINE double least() const {
    return fold([](auto a, auto b) __attribute__((always_inline)) { return b < a ? b : a; });
  }
};

// The means of the selectable prompts among k .. k + count - 1; infinity in all other lanes.
template <typename Doubles>
SAPO_INLINE Lanes<Doubles> candidates(const Reweight& a, int64_t k, int count) {
  constexpr int kWidth = Lanes<Doubles>::kWidth;
  double live[kLanes] = {};
  for (int l = 0; l < count; ++l) live[l] = a.live[k + l];
  Lanes<Doubles> mean(a.mean + k, count, kInfinity);
  for (int v = 0; v < Lanes<Doubles>::kVectors; ++v) {
    Doubles mask;
    std::memcpy(&mask, live + v * kWidth, sizeof mask);
    mean.part[v] = ((mask != 0.0) & is_finite(mean.part[v])) ? mean.part[v] : Doubles{} + kInfinity;
  }
  return mean;
}

// Folds the new losses of prompts k .. k + count - 1 into their means and weights.
template <typename Doubles>
SAPO_INLINE void update_lanes(const Reweight& a, int64_t k, int count) {
  double converted[kLanes] = {};
  for (int l = 0; l < count; ++l) converted[l] = static_cast<double>(a.tokens[k + l]);
  Lanes<Doubles> mean(a.mean + k, count, 0), weight(a.weight + k, count, 0);
  const Lanes<Doubles> nll(a.nll + k, count, 0), tokens(converted, kLanes, 0);
  for (int v = 0; v < Lanes<Doubles>::kVectors; ++v) {
    update(mean.part[v], weight.part[v], nll.part[v], tokens.part[v], a.decay);
  }
  mean.store(a.mean + k, count);
  weight.store(a.weight + k, count);
}

// One pool; the pointers of `a` are those of its first prompt.
template <typename Doubles>
SAPO_INLINE void reweight_pool(const Reweight& a) {
  constexpr int kWidth = Lanes<Doubles>::kWidth, kVectors = Lanes<Doubles>::kVectors;
  const Doubles zero = {};
  const auto count = [&](int64_t k) __attribute__((always_inline)) {
    return static_cast<int>(std::min<int64_t>(kLanes, a.prompts - k));
  };

  Lanes<Doubles> lowest(kInfinity), selectable(0), first(kInfinity);
  for (int64_t k = 0; k < a.prompts; k += kLanes) {
    update_lanes<Doubles>(a, k, count(k));
    const auto mean = candidates<Doubles>(a, k, count(k));
    if (k == 0) first = mean;
    for (int v = 0; v < kVectors; ++v) {
      selectable.part[v] += mean.part[v] < kInfinity ? zero + 1.0 : zero;
      lowest.part[v] = mean.part[v] < lowest.part[v] ? mean.part[v] : lowest.part[v];
    }
  }
  const double live = selectable.sum(), low = lowest.least();
  if (live == 0) {
    a.best[0] = -1;
    return;
  }
  // Bounded: the mask and the means may be written by another thread meanwhile.
  int64_t best = 0;
  while (best < a.prompts && !(a.live[best] && a.mean[best] == low)) ++best;
  if (best == a.prompts) {
    a.best[0] = -1;
    return;
  }
  a.best[0] = best;

  // Most pools have no more prompts than lanes; only the larger ones load their means again.
  const auto means = [&](int64_t k) __attribute__((always_inline)) {
    return k == 0 ? first : candidates<Doubles>(a, k, count(k));
  };
  Lanes<Doubles> total(0);
  for (int64_t k = 0; k < a.prompts; k += kLanes) {
    Lanes<Doubles> e(0);
    if (a.inverse_temperature == 0) {
      if (best >= k && best - k < kLanes) e.part[(best - k) / kWidth][(best - k) % kWidth] = 1;
    } else {
      const auto mean = means(k);
      for (int v = 0; v < kVectors; ++v) e.part[v] = exp_nonpositive((low - mean.part[v]) * a.inverse_temperature);
    }
    for (int v = 0; v < kVectors; ++v) total.part[v] += e.part[v];
    e.store(a.probs + k, count(k));
  }
  const double inverse = 1.0 / total.sum(), keep = 1.0 - a.floor, base = a.floor / live;
  Lanes<Doubles> squares(0);
  for (int64_t k = 0; k < a.prompts; k += kLanes) {
    const auto mean = means(k);
    Lanes<Doubles> p(a.probs + k, count(k), 0);
    for (int v = 0; v < kVectors; ++v) {
      p.part[v] = mean.part[v] < kInfinity ? keep * (p.part[v] * inverse) + base : zero;
      squares.part[v] += p.part[v] * p.part[v];
    }
    p.store(a.probs + k, count(k));
  }
  a.effective[0] = 1.0 / squares.sum();
}

template <typename Doubles>
SAPO_INLINE void reweight_pools(const Reweight& a) {
  Reweight pool = a;
  for (int64_t p = 0; p < a.pools; ++p) {
    reweight_pool<Doubles>(pool);
    pool.mean += a.prompts;
    pool.weight += a.prompts;
    pool.probs += a.prompts;
    pool.best += 1;
    pool.effective += 1;
    pool.live += a.prompts;
    pool.nll += a.prompts;
    pool.tokens += a.prompts;
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void reweight_avx2(const Reweight& a) { reweight_pools<Doubles4>(a); }
#endif

}  // namespace

void reweight_cpu(const Reweight& a) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    reweight_avx2(a);
    return;
  }
#endif
  reweight_pools<Doubles2>(a);
}

}  // namespace sapo
