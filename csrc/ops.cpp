// The CPU kernels of torch.ops.sapo_kernels.*. Their schemas stand in sapo_kernels/ops.py, once for the compiled and
// the plain-torch kernels; csrc/cuda/ops.cpp is the same list for CUDA.
#include "accumulate.h"
#include "reweight.h"

namespace {

using sapo::Tensor;

void accumulate_(Tensor nll, Tensor tokens, Tensor logprob, Tensor cell_target, Tensor cell_ptr, int64_t start) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t index = 0;
  if (logprob.scalar_type() == sapo::ScalarType::Double) {
    sapo::accumulate_cpu(
        sapo::accumulate_arguments<double>(cpu, &index, nll, tokens, logprob, cell_target, cell_ptr, start));
  } else {
    sapo::accumulate_cpu(
        sapo::accumulate_arguments<float>(cpu, &index, nll, tokens, logprob, cell_target, cell_ptr, start));
  }
}

void reweight_(Tensor mean, Tensor weight, Tensor probs, Tensor best, Tensor effective, Tensor live, Tensor nll,
               Tensor tokens, double decay, double temperature, double floor) {
  int32_t index = 0;
  sapo::reweight_cpu(sapo::reweight_arguments(aoti_torch_device_type_cpu(), &index, mean, weight, probs, best,
                                              effective, live, nll, tokens, decay, temperature, floor));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sapo_kernels, CPU, m) {
  m.impl("accumulate_", TORCH_BOX(&accumulate_));
  m.impl("reweight_", TORCH_BOX(&reweight_));
}
