// What the launchers in csrc/cuda/*.cu share with ops.cpp. No torch header here: nvcc compiles raw pointers and a
// stream only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sapo {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Enqueues one kernel of a single argument on `stream` (a cudaStream_t) of the current device.
template <typename Argument>
void launch(void (*kernel)(Argument), int64_t blocks, int threads, void* stream, const Argument& argument,
            const char* op) {
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(op) + ": expected fewer elements, got a grid of " + std::to_string(blocks));
  }
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(argument);
  cuda_check(cudaGetLastError(), op);
#else
  // The tests compile the kernels for a CPU: tests/native/cuda_emulator/cuda_runtime.h.
  static_cast<void>(stream);
  emulator::run(kernel, static_cast<unsigned>(blocks), threads, argument);
#endif
}

}  // namespace sapo
