// SAPO_CHECK: errors that name the operator, the argument, what was wanted and what was got.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sapo {

// A message of the form "operator: argument: expected ..., got ..."; torch hands it to Python as a RuntimeError.
#define SAPO_CHECK(condition, ...)                            \
  do {                                                        \
    if (!(condition)) {                                       \
      throw std::runtime_error(::sapo::message(__VA_ARGS__)); \
    }                                                         \
  } while (0)

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace sapo
