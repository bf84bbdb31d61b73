// Whether this driver and these devices can run the kernels that were compiled.
#pragma once

#include <string>

namespace sapo {

// Empty if they all can, else the reason in words.
std::string why_not_here();

}  // namespace sapo
