// The CUDA kernels of torch.ops.sapo_kernels.*. Loads without CUDA too:
// the current stream is looked up in torch's CUDA library by name, when it is needed. Nothing is registered by loading
// it: sapo_kernels/native.py asks first whether driver and devices can run what is in here.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../ops.h"
#include "device.h"

namespace {

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

struct Cuda {
  static int32_t type() { return aoti_torch_device_type_cuda(); }
  template <typename Call>
  static void run(const Call& a, int32_t device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    sapo::run_cuda(a, current_stream(device));
  }
};

}  // namespace

extern "C" {

// Registers the kernels if this driver and every visible device can run them. Returns an empty text then, else why not.
__attribute__((visibility("default"))) const char* sapo_kernels_register_cuda() {
  static const std::string result = []() -> std::string {
    const std::string reason = sapo::why_not_here();
    if (!reason.empty()) return reason;
    try {
      using torch::stable::detail::StableLibrary;
      static const torch::stable::detail::StableTorchLibraryInit library(
          StableLibrary::Kind::IMPL, &sapo::register_kernels<Cuda>, "sapo_kernels", "CUDA", __FILE__, __LINE__);
    } catch (const std::exception& refused) {
      return refused.what();
    }
    return "";
  }();
  return result.c_str();
}

}  // extern "C"
