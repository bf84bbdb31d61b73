// From the tensors of a reweight_ call to checked raw pointers, for every device.
#pragma once

#include "arguments.h"
#include "reweight_args.h"

namespace sapo {

inline Reweight reweight_arguments(Arguments& check, const Tensor& mean, const Tensor& weight, const Tensor& probs,
                                   const Tensor& best, const Tensor& effective, const Tensor& live, const Tensor& nll,
                                   const Tensor& tokens, double decay, double temperature, double floor) {
  SAPO_CHECK(mean.dim() == 2, "reweight_: mean: expected [pools, prompts], got ", mean.dim(), " dimensions");
  const int64_t pools = mean.size(0), prompts = mean.size(1);
  check.tensor("mean", mean, ScalarType::Double, {pools, prompts}, true);
  check.tensor("weight", weight, ScalarType::Double, {pools, prompts}, true);
  check.tensor("probs", probs, ScalarType::Double, {pools, prompts}, true);
  check.tensor("best", best, ScalarType::Long, {pools}, true);
  check.tensor("effective", effective, ScalarType::Double, {pools}, true);
  check.tensor("live", live, ScalarType::Bool, {pools, prompts});
  check.tensor("nll", nll, ScalarType::Double, {pools, prompts});
  check.tensor("tokens", tokens, ScalarType::Long, {pools, prompts});
  check.number("decay", decay, 0.0, 1.0);
  check.number("temperature", temperature, 0.0, DBL_MAX);
  check.number("floor", floor, 0.0, 1.0);
  // The inverse of the smallest temperatures overflows, and that of the largest may be flushed to 0, which means
  // argmin.
  const double inverse = temperature == 0 ? 0.0 : std::fmax(std::fmin(1.0 / temperature, DBL_MAX), DBL_MIN);
  return {static_cast<double*>(mean.mutable_data_ptr()),
          static_cast<double*>(weight.mutable_data_ptr()),
          static_cast<double*>(probs.mutable_data_ptr()),
          static_cast<int64_t*>(best.mutable_data_ptr()),
          static_cast<double*>(effective.mutable_data_ptr()),
          static_cast<const uint8_t*>(live.const_data_ptr()),
          static_cast<const double*>(nll.const_data_ptr()),
          static_cast<const int64_t*>(tokens.const_data_ptr()),
          pools,
          prompts,
          decay,
          inverse,
          floor};
}

}  // namespace sapo
