#include "device.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <sstream>

#ifndef SAPO_CUDA_ARCHS
#error "compile with -DSAPO_CUDA_ARCHS=\"80;90+PTX\", the architectures that code was made for"
#endif

namespace sapo {
namespace {

// Machine code runs on devices of its own major version and at least its minor one, PTX on all later ones too.
bool runs_on(int major, int minor) {
  const int device = major * 10 + minor;
  std::istringstream archs(SAPO_CUDA_ARCHS);
  for (std::string arch; std::getline(archs, arch, ';');) {
    const int number = std::atoi(arch.c_str());
    const bool ptx = arch.find("+PTX") != std::string::npos;
    // "90a" and "100f" are for exactly that one.
    const bool exact = arch.find_first_of("af") != std::string::npos;
    if (exact ? device == number : device >= number && (ptx || number / 10 == major)) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::string why_not_here() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    return std::string("CUDA: ") + cudaGetErrorString(error);
  }
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (!runs_on(major, minor)) {
      std::ostringstream text;
      text << "compiled for " << SAPO_CUDA_ARCHS << ", device " << device << " has capability " << major << '.'
           << minor;
      return text.str();
    }
  }
  return count ? "" : "no CUDA device";
}

}  // namespace sapo
