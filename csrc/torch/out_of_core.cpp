// SPDX-License-Identifier: Apache-2.0
#include "structmat/out_of_core.h"

#include "convert.h"

namespace structmat::torch_bindings {
namespace {

constexpr const char* op = "block_sweep";
constexpr std::int64_t kFacts = sizeof(BlockFacts) / sizeof(double);

MatrixView by_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1), op, ": ", name,
                  " must be a matrix with contiguous rows");
  return matrix_view(t, op, name);
}

void block_sweep(const Tensor& A, const Tensor& X, Tensor Y, Tensor Z, Tensor facts, bool measure) {
  STD_TORCH_CHECK(facts.scalar_type() == ScalarType::Double && facts.numel() == kFacts, op,
                  ": facts must be ", kFacts, " numbers of float64");
  Context context;
  structmat::block_sweep(context, strided_matrix_view(A, op, "A"), by_rows(X, "X"), by_rows(Y, "Y"),
                         by_rows(Z, "Z"), measure, static_cast<BlockFacts*>(facts.data_ptr()));
}

}  // namespace

// The CPU's alone: on a GPU blocks are multiplied by torch.
STRUCTMAT_IMPL(CPU, m) {
  m.impl("block_sweep", TORCH_BOX(&block_sweep));
}

}  // namespace structmat::torch_bindings
