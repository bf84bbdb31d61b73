// The operators as torch calls them: checks, then the kernel of one device. `Device` has the type that the operators
// are registered for, and runs a kernel on the device of that type with an index.
#pragma once

#include "accumulate.h"
#include "reweight.h"

namespace sapo {

template <typename Device>
void accumulate_(Tensor nll, Tensor tokens, Tensor logprob, Tensor cell_target, Tensor cell_ptr, int64_t start) {
  Arguments check("accumulate_", Device::type());
  const auto run = [&](auto real) {
    const auto a = accumulate_arguments<decltype(real)>(check, nll, tokens, logprob, cell_target, cell_ptr, start);
    Device::run(a, check.device_index());
  };
  logprob.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

template <typename Device>
void reweight_(Tensor mean, Tensor weight, Tensor probs, Tensor best, Tensor effective, Tensor live, Tensor nll,
               Tensor tokens, double decay, double temperature, double floor) {
  Arguments check("reweight_", Device::type());
  const Reweight a =
      reweight_arguments(check, mean, weight, probs, best, effective, live, nll, tokens, decay, temperature, floor);
  Device::run(a, check.device_index());
}

template <typename Device>
void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("accumulate_", TORCH_BOX(&accumulate_<Device>));
  m.impl("reweight_", TORCH_BOX(&reweight_<Device>));
}

}  // namespace sapo
