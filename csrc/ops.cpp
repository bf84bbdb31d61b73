// The CPU kernels of torch.ops.sapo_kernels.*. Their schemas stand in sapo_kernels/ops.py, once for the compiled and
// the plain-torch kernels.
#include "ops.h"

namespace {

struct Cpu {
  static int32_t type() { return aoti_torch_device_type_cpu(); }
  template <typename Call>
  static void run(const Call& a, int32_t) {
    sapo::run_cpu(a);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sapo_kernels, CPU, m) { sapo::register_kernels<Cpu>(m); }
