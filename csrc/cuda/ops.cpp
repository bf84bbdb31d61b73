// The CUDA kernels of torch.ops.sapo_kernels.*: the list of csrc/ops.cpp for the other device. Loads without CUDA too:
// the current stream is looked up in torch's CUDA library by name, when it is needed. Nothing is registered by loading
// it: sapo_kernels/native.py asks first whether driver and devices can run what is in here.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../accumulate.h"
#include "../reweight.h"
#include "device.h"

namespace {

using sapo::Tensor;

// torch's current stream on `device`, a cudaStream_t.
void* current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    // torch loads its libraries privately, so the symbol is not in the global scope; NOLOAD never loads a second one.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  SAPO_CHECK(getter, "sapo_kernels: expected a torch with CUDA, got one without aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

template <typename Real>
void accumulate(const Tensor& nll, const Tensor& tokens, const Tensor& logprob, const Tensor& cell_target,
                const Tensor& cell_ptr, int64_t start) {
  int32_t device = 0;
  const auto a = sapo::accumulate_arguments<Real>(aoti_torch_device_type_cuda(), &device, nll, tokens, logprob,
                                                  cell_target, cell_ptr, start);
  const torch::stable::accelerator::DeviceGuard guard(device);
  sapo::accumulate_cuda(a, current_stream(device));
}

void accumulate_(Tensor nll, Tensor tokens, Tensor logprob, Tensor cell_target, Tensor cell_ptr, int64_t start) {
  if (logprob.scalar_type() == sapo::ScalarType::Double) {
    accumulate<double>(nll, tokens, logprob, cell_target, cell_ptr, start);
  } else {
    accumulate<float>(nll, tokens, logprob, cell_target, cell_ptr, start);
  }
}

void reweight_(Tensor mean, Tensor weight, Tensor probs, Tensor best, Tensor effective, Tensor live, Tensor nll,
               Tensor tokens, double decay, double temperature, double floor) {
  int32_t device = 0;
  const auto a = sapo::reweight_arguments(aoti_torch_device_type_cuda(), &device, mean, weight, probs, best, effective,
                                          live, nll, tokens, decay, temperature, floor);
  const torch::stable::accelerator::DeviceGuard guard(device);
  sapo::reweight_cuda(a, current_stream(device));
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("accumulate_", TORCH_BOX(&accumulate_));
  m.impl("reweight_", TORCH_BOX(&reweight_));
}

}  // namespace

extern "C" {

// Registers the kernels if this driver and every visible device can run them. Returns an empty text then, else why not.
__attribute__((visibility("default"))) const char* sapo_kernels_register_cuda() {
  static const std::string result = []() -> std::string {
    const std::string reason = sapo::why_not_here();
    if (!reason.empty()) return reason;
    try {
      using torch::stable::detail::StableLibrary;
      static const torch::stable::detail::StableTorchLibraryInit library(StableLibrary::Kind::IMPL, &register_kernels,
                                                                         "sapo_kernels", "CUDA", __FILE__, __LINE__);
    } catch (const std::exception& refused) {
      return refused.what();
    }
    return "";
  }();
  return result.c_str();
}

}  // extern "C"
