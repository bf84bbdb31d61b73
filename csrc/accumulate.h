// From the tensors of an accumulate_ call to checked raw pointers, for every device.
#pragma once

#include "accumulate_args.h"
#include "arguments.h"

namespace sapo {

template <typename Real>
Accumulate<Real> accumulate_arguments(Arguments& check, const Tensor& nll, const Tensor& tokens, const Tensor& logprob,
                                      const Tensor& cell_target, const Tensor& cell_ptr, int64_t start) {
  for (const auto& [name, value] :
       {std::pair<const char*, const Tensor&>{"nll", nll}, {"logprob", logprob}, {"cell_target", cell_target}}) {
    SAPO_CHECK(value.dim() == 1, "accumulate_: ", name, ": expected 1 dimension, got ", value.dim());
  }
  const int64_t cells = nll.size(0), entries = cell_target.size(0), count = logprob.size(0);
  const bool wide = std::is_same_v<Real, double>;
  check.tensor("nll", nll, ScalarType::Double, {cells}, true);
  check.tensor("tokens", tokens, ScalarType::Long, {cells}, true);
  check.tensor("logprob", logprob, wide ? ScalarType::Double : ScalarType::Float, {count});
  check.tensor("cell_target", cell_target, ScalarType::Long, {entries});
  check.tensor("cell_ptr", cell_ptr, ScalarType::Long, {cells + 1});
  SAPO_CHECK(start >= 0, "accumulate_: start: expected at least 0, got ", start);
  return {static_cast<double*>(nll.mutable_data_ptr()),
          static_cast<int64_t*>(tokens.mutable_data_ptr()),
          static_cast<const Real*>(logprob.const_data_ptr()),
          static_cast<const int64_t*>(cell_target.const_data_ptr()),
          static_cast<const int64_t*>(cell_ptr.const_data_ptr()),
          cells,
          entries,
          start,
          count};
}

}  // namespace sapo
