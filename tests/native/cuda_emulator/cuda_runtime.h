// Enough of CUDA to compile csrc/cuda/*.cu with g++ and run the kernels on a CPU: every lane of a warp is a thread, and
// a shuffle is a meeting of all 32. Checks the logic of a kernel on a machine without a GPU; says nothing of its speed.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

namespace emulator {

// Where the lanes of one warp meet. A lane that returned takes part in nothing, as on the device.
class Warp {
 public:
  template <typename Value>
  Value exchange(int lane, int from, Value value) {
    std::memcpy(&slots_[lane], &value, sizeof value);
    meet();
    std::memcpy(&value, &slots_[from], sizeof value);
    meet();
    return value;
  }
  void leave() {
    std::unique_lock lock(mutex_);
    --present_;
    release();
  }

 private:
  void meet() {
    std::unique_lock lock(mutex_);
    const int round = round_;
    ++waiting_;
    release();
    changed_.wait(lock, [&] { return round_ != round; });
  }
  void release() {
    if (waiting_ > 0 && waiting_ == present_) {
      waiting_ = 0;
      ++round_;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int present_ = 32, waiting_ = 0, round_ = 0;
  uint64_t slots_[32] = {};
};

inline thread_local Warp* warp;

}  // namespace emulator

template <typename Value>
Value __shfl_sync(unsigned, Value value, int from) {
  return emulator::warp->exchange(threadIdx.x % 32, from, value);
}
template <typename Value>
Value __shfl_down_sync(unsigned, Value value, int step) {
  const int lane = threadIdx.x % 32;
  return emulator::warp->exchange(lane, lane + step < 32 ? lane + step : lane, value);
}
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  const int lane = threadIdx.x % 32;
  return emulator::warp->exchange(lane, lane ^ mask, value);
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace emulator {

template <typename Argument>
void run(void (*kernel)(Argument), unsigned blocks, unsigned threads, Argument argument) {
  for (unsigned block = 0; block < blocks; ++block) {
    for (unsigned first = 0; first < threads; first += 32) {
      Warp meeting;
      std::vector<std::thread> lanes;
      for (unsigned lane = 0; lane < 32; ++lane) {
        lanes.emplace_back([&, lane] {
          threadIdx.x = first + lane;
          blockIdx.x = block;
          warp = &meeting;
          kernel(argument);
          meeting.leave();
        });
      }
      for (std::thread& lane : lanes) lane.join();
    }
  }
}

}  // namespace emulator
