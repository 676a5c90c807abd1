// SPDX-License-Identifier: Apache-2.0
#include "structmat/error.h"

namespace structmat::detail {

void fail(const std::string& what) {
  throw Error(what);
}

}  // namespace structmat::detail
