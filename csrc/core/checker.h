// SPDX-License-Identifier: Apache-2.0
// The texts of errors about operands: "low_rank_linear: U is (4, 3), wanted (4, 2)".
#pragma once
#include <string>

#include "structmat/context.h"
#include "structmat/error.h"
#include "structmat/matrix.h"

namespace structmat {

class Checker {
 public:
  Checker(const char* op, DType dtype) : op_(op), dtype_(dtype) {}

  void matrix(const char* name, const ConstMatrixView& a, std::int64_t rows,
              std::int64_t cols) const {
    STRUCTMAT_CHECK(a.rows == rows && a.cols == cols,
                    prefix(name) + "is (" + std::to_string(a.rows) + ", " + std::to_string(a.cols) +
                        "), wanted (" + std::to_string(rows) + ", " + std::to_string(cols) + ")");
    STRUCTMAT_CHECK(a.row_stride >= a.cols || a.rows <= 1,
                    prefix(name) + "has overlapping rows: row stride " +
                        std::to_string(a.row_stride) + ", " + std::to_string(a.cols) + " columns");
    same_dtype(name, a.dtype);
  }
  void array(const char* name, const ConstArrayView& a) const {
    for (std::int64_t size : a.sizes)
      STRUCTMAT_CHECK(size >= 0, prefix(name) + "has a negative size in " + shape(a));
    same_dtype(name, a.dtype);
  }
  void vector(const char* name, const ConstVectorView& a, std::int64_t size) const {
    STRUCTMAT_CHECK(a.size == size, prefix(name) + "has " + std::to_string(a.size) +
                                        " elements, wanted " + std::to_string(size));
    same_dtype(name, a.dtype);
  }
  void workspace(const Context& context, std::size_t wanted) const {
    STRUCTMAT_CHECK(context.workspace_bytes >= wanted, std::string(op_) + ": the workspace has " +
                                                           std::to_string(context.workspace_bytes) +
                                                           " bytes, wanted " +
                                                           std::to_string(wanted));
  }

  static std::string shape(const ConstArrayView& a) {
    std::string text;
    for (std::int64_t size : a.sizes) {
      text += text.empty() ? "(" : ", ";
      text += std::to_string(size);
    }
    return text + ')';
  }

 private:
  std::string prefix(const char* name) const { return std::string(op_) + ": " + name + " "; }
  void same_dtype(const char* name, DType dtype) const {
    STRUCTMAT_CHECK(dtype == dtype_,
                    prefix(name) + "is " + name_of(dtype) + ", wanted " + name_of(dtype_));
  }

  const char* op_;
  DType dtype_;
};

}  // namespace structmat
