// SPDX-License-Identifier: Apache-2.0
// The back ends of linalg.h.
#pragma once
#include "structmat/linalg.h"

namespace structmat {

void orthonormalize_cpu(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                        MatrixView q, VectorView residual);
void orthonormalize_cuda(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                         MatrixView q, VectorView residual);
std::size_t orthonormalize_workspace_cuda(const StridedMatrixView& y);

void gram_matmul_cpu(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                     MatrixView z, GramMoments moments);
void gram_matmul_cuda(const Context& context, const StridedMatrixView& a,
                      const StridedMatrixView& x, MatrixView z, GramMoments moments);
std::size_t gram_matmul_workspace_cuda(const StridedMatrixView& a, const StridedMatrixView& x);

void range_step_cpu(const Context& context, const RangeStep& step, std::uint64_t seed);
void range_step_cuda(const Context& context, const RangeStep& step, std::uint64_t seed);
std::size_t range_step_workspace_cuda(const RangeStep& step);

void svd_tail_cpu(const Context& context, const StridedMatrixView& a, const SvdTailOptions& options,
                  MatrixView u, VectorView s, MatrixView vh, SvdInfo* info);

}  // namespace structmat
