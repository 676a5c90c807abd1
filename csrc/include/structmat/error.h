// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>
#include <string>

#include "structmat/export.h"

namespace structmat {

// Thrown for shapes, dtypes or devices an operation does not accept, and for failed CUDA calls.
class STRUCTMAT_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Thrown when a decomposition has no finite answer: non-finite input, or no convergence.
class STRUCTMAT_API LinAlgError : public Error {
 public:
  using Error::Error;
};

namespace detail {
[[noreturn]] STRUCTMAT_API void fail(const std::string& what);
}

}  // namespace structmat

// The message names the operation, what arrived and what was wanted. It is built only on failure.
#define STRUCTMAT_CHECK(condition, message)               \
  do {                                                    \
    if (!(condition)) ::structmat::detail::fail(message); \
  } while (0)
