// Argument checks that the CPU and the CUDA operators share. Every check runs before the first write.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "check.h"

namespace sapo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string brackets(const int64_t* sizes, int64_t count) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < count; ++i) {
    text << (i ? ", " : "") << sizes[i];
  }
  text << ']';
  return text.str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// The arguments of one call. The first one fixes the device; all others must be on it.
class Arguments {
 public:
  // device_type: the one that the operator was registered for, e.g. aoti_torch_device_type_cpu().
  Arguments(const char* op, int32_t device_type) : op_(op), device_type_(device_type) {}

  // Dense tensor of that dtype and shape. `written` ones must share no memory with any other argument.
  void tensor(const char* name, const Tensor& value, ScalarType dtype, std::initializer_list<int64_t> shape,
              bool written = false) {
    const auto sizes = value.sizes();
    const bool same_shape =
        static_cast<size_t>(value.dim()) == shape.size() && std::equal(shape.begin(), shape.end(), sizes.data());
    SAPO_CHECK(value.scalar_type() == dtype, op_, ": ", name, ": expected ", dtype_name(dtype), ", got ",
               dtype_name(value.scalar_type()));
    SAPO_CHECK(same_shape, op_, ": ", name, ": expected shape ", brackets(shape.begin(), shape.size()), ", got ",
               brackets(sizes.data(), value.dim()));
    SAPO_CHECK(value.is_contiguous(), op_, ": ", name, ": expected contiguous strides, got ",
               brackets(value.strides().data(), value.dim()));
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(value.get(), &type));
    const int32_t index = value.get_device_index();
    SAPO_CHECK(type == device_type_ && (count_ == 0 || index == device_index_), op_, ": ", name,
               ": expected it on the device of the other arguments, got another (type ", type, ", index ", index,
               " beside type ", device_type_, ", index ", count_ == 0 ? index : device_index_, ")");
    device_index_ = index;
    const char* first = static_cast<const char*>(value.data_ptr());
    const int64_t element = value.element_size();
    SAPO_CHECK(reinterpret_cast<uintptr_t>(first) % element == 0, op_, ": ", name,
               ": expected memory aligned to its elements, got an address that is not");
    const char* last = first + value.numel() * element;
    for (int i = 0; i < count_; ++i) {
      const bool apart = first >= seen_[i].last || last <= seen_[i].first;
      SAPO_CHECK(apart || !(written || seen_[i].written), op_, ": ", name, ": expected memory of its own, got some of ",
                 seen_[i].name, "'s");
    }
    SAPO_CHECK(count_ < kMost, op_, ": too many arguments");
    seen_[count_++] = {name, first, last, written};
  }

  // A finite number in [low, high].
  void number(const char* name, double value, double low, double high) const {
    SAPO_CHECK(std::isfinite(value) && value >= low && value <= high, op_, ": ", name, ": expected a number from ", low,
               " to ", high, ", got ", value);
  }

  int32_t device_index() const { return device_index_; }

 private:
  struct Seen {
    const char* name;
    const char* first;
    const char* last;
    bool written;
  };
  static constexpr int kMost = 12;
  const char* op_;
  int32_t device_type_;
  int32_t device_index_ = 0;
  int count_ = 0;
  Seen seen_[kMost] = {};
};

}  // namespace sapo
