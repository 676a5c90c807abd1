// SPDX-License-Identifier: Apache-2.0
#include "structmat/streaming_svd.h"

#include <algorithm>
#include <string>

#include "ceil_div.h"
#include "streaming_svd/streaming_svd_kernels.h"
#include "structmat/error.h"

namespace structmat {
namespace {

// Up to this many times as wide as the factor it replaces, the matrix of second moments costs at
// most half as much per row (n^2 FLOPs against 8 keep n) and loses nothing.
constexpr std::int64_t kExactWidth = 4;
constexpr std::int64_t kExactChunk = 128;

void check_view(const void* data, DType dtype, DType wanted_dtype, std::int64_t rows,
                std::int64_t cols, std::int64_t wanted_rows, std::int64_t wanted_cols,
                const char* name) {
  STRUCTMAT_CHECK(
      data != nullptr && dtype == wanted_dtype && rows == wanted_rows && cols == wanted_cols,
      std::string("streaming_svd: ") + name + " is " + name_of(dtype) + " (" +
          std::to_string(rows) + ", " + std::to_string(cols) + "), wanted " +
          name_of(wanted_dtype) + " (" + std::to_string(wanted_rows) + ", " +
          std::to_string(wanted_cols) + ")");
}

void check_state(const Context& context, const StreamingSvdState& s) {
  const std::int64_t n = s.buffer.cols;
  const StreamingSvdShape shape = streaming_svd_shape(n, s.rank);
  const DType wide = DType::f64;
  check_view(s.buffer.data, s.buffer.dtype, s.buffer.dtype, s.buffer.rows, n, shape.chunk, n,
             "the buffer");
  check_view(s.factor.data, s.factor.dtype, wide, s.factor.rows, s.factor.cols, shape.keep, n,
             "the factor");
  check_view(s.mean.data, s.mean.dtype, wide, s.mean.size, 1, n, 1, "the mean");
  check_view(s.facts.data, s.facts.dtype, wide, s.facts.size, 1, 2, 1, "facts");
  STRUCTMAT_CHECK(s.buffer.row_stride == n && s.factor.row_stride == n,
                  "streaming_svd: the buffer and the factor must be contiguous");
  STRUCTMAT_CHECK(
      s.decay > 0 && s.decay <= 1,
      "streaming_svd: decay is " + std::to_string(s.decay) + ", wanted more than 0 and at most 1");
  STRUCTMAT_CHECK(s.buffered >= 0 && s.buffered < shape.chunk && s.buffered <= s.rows,
                  "streaming_svd: " + std::to_string(s.buffered) + " of " + std::to_string(s.rows) +
                      " rows are buffered, wanted fewer than " + std::to_string(shape.chunk));
  if (context.device != Device::cuda) return;
  const std::size_t wanted = streaming_svd_workspace(context, s);
  STRUCTMAT_CHECK(context.workspace_bytes >= wanted,
                  "streaming_svd: the workspace has " + std::to_string(context.workspace_bytes) +
                      " bytes, wanted " + std::to_string(wanted));
}

void fold(const Context& context, const StreamingSvdState& s, const StridedMatrixView& rows) {
  context.device == Device::cuda ? streaming_svd_fold_cuda(context, s, rows)
                                 : streaming_svd_fold_cpu(context, s, rows);
}

StridedMatrixView buffered_rows(const StreamingSvdState& s) {
  return {s.buffer.data, s.buffer.dtype, s.buffered, s.buffer.cols, s.buffer.row_stride, 1};
}

MatrixView part(const MatrixView& m, std::int64_t first, std::int64_t count) {
  auto* data = static_cast<unsigned char*>(m.data) +
               static_cast<std::size_t>(first * m.row_stride) * size_of(m.dtype);
  return {data, m.dtype, count, m.cols, m.row_stride};
}
StridedMatrixView part(const StridedMatrixView& m, std::int64_t first, std::int64_t count) {
  const auto* data = static_cast<const unsigned char*>(m.data) +
                     first * m.row_stride * static_cast<std::int64_t>(size_of(m.dtype));
  return {data, m.dtype, count, m.cols, m.row_stride, m.col_stride};
}
CsrView part(const CsrView& m, std::int64_t first, std::int64_t count) {
  return {m.starts + first, m.columns, m.values, m.dtype, count};
}

// Whole chunks that arrive at an empty buffer need no copy.
bool fold_in_place(const Context& context, const StreamingSvdState& s,
                   const StridedMatrixView& chunk) {
  if (context.device == Device::cuda && chunk.col_stride != 1) return false;
  fold(context, s, chunk);
  return true;
}
bool fold_in_place(const Context&, const StreamingSvdState&, const CsrView&) {
  return false;
}

template <class Rows>
void append(const Context& context, StreamingSvdState& s, const Rows& rows) {
  const std::int64_t chunk = s.buffer.rows;
  for (std::int64_t first = 0; first < rows.rows;) {
    const std::int64_t count = std::min(rows.rows - first, chunk - s.buffered);
    const Rows next = part(rows, first, count);
    first += count;
    if (count == chunk && fold_in_place(context, s, next)) {
      s.rows += chunk;
      continue;
    }
    const MatrixView to = part(s.buffer, s.buffered, count);
    context.device == Device::cuda ? streaming_svd_store_cuda(context, next, to)
                                   : streaming_svd_store_cpu(context, next, to);
    s.rows += count;
    s.buffered += count;
    if (s.buffered == chunk) {
      fold(context, s, buffered_rows(s));
      s.buffered = 0;
    }
  }
}

void check_rows(const StreamingSvdState& s, DType dtype, std::int64_t cols) {
  STRUCTMAT_CHECK(dtype == s.buffer.dtype && cols == s.buffer.cols,
                  std::string("streaming_svd: rows are ") + name_of(dtype) + " of width " +
                      std::to_string(cols) + ", wanted " + name_of(s.buffer.dtype) + " of width " +
                      std::to_string(s.buffer.cols));
}

}  // namespace

StreamingSvdShape streaming_svd_shape(std::int64_t n, std::int64_t rank) {
  STRUCTMAT_CHECK(n >= 1 && rank >= 1 && rank <= n,
                  "streaming_svd: rank is " + std::to_string(rank) + " of " + std::to_string(n) +
                      " columns, wanted 1 to the number of columns");
  const std::int64_t keep = ceil_div(2 * rank + 16, 16) * 16;
  if (n <= std::min(kExactWidth * keep, kLargestProblem)) return {n, kExactChunk, true};
  STRUCTMAT_CHECK(keep <= 10000, "streaming_svd: rank is " + std::to_string(rank) + " of " +
                                     std::to_string(n) +
                                     " columns, wanted at most 4992 of more than 32766");
  return {keep, keep, false};
}

void streaming_svd_update(const Context& context, StreamingSvdState& state,
                          const StridedMatrixView& rows) {
  check_state(context, state);
  check_rows(state, rows.dtype, rows.cols);
  append(context, state, rows);
}

void streaming_svd_update(const Context& context, StreamingSvdState& state, const CsrView& rows) {
  check_state(context, state);
  check_rows(state, rows.dtype, state.buffer.cols);
  append(context, state, rows);
}

void streaming_svd_check(const Context& context, const StridedMatrixView& values, double* finite) {
  STRUCTMAT_CHECK(finite != nullptr, "streaming_svd: finite is null");
  context.device == Device::cuda ? streaming_svd_check_cuda(context, values, finite)
                                 : streaming_svd_check_cpu(context, values, finite);
}

void streaming_svd_fold(const Context& context, StreamingSvdState& state) {
  check_state(context, state);
  if (state.buffered == 0) return;
  fold(context, state, buffered_rows(state));
  state.buffered = 0;
}

void streaming_svd_merge(const Context& context, StreamingSvdState& state,
                         const StreamingSvdState& other) {
  check_state(context, state);
  check_state(context, other);
  STRUCTMAT_CHECK(state.rank == other.rank && state.buffer.cols == other.buffer.cols &&
                      state.decay == other.decay && state.center == other.center &&
                      state.buffer.dtype == other.buffer.dtype,
                  "streaming_svd: states of different n, rank, decay, center or type do not merge");
  if (other.rows > other.buffered) {
    streaming_svd_fold(context, state);
    context.device == Device::cuda ? streaming_svd_merge_cuda(context, state, other)
                                   : streaming_svd_merge_cpu(context, state, other);
    state.rows += other.rows - other.buffered;
  }
  append(context, state, buffered_rows(other));
}

void streaming_svd_result(const Context& context, const StreamingSvdState& state,
                          std::uint64_t seed, VectorView s, MatrixView vh, SvdInfo* info) {
  check_state(context, state);
  STRUCTMAT_CHECK(state.buffered == 0, "streaming_svd: " + std::to_string(state.buffered) +
                                           " rows are buffered, wanted 0: fold them first");
  const DType dtype = state.buffer.dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::int64_t n = state.buffer.cols;
  check_view(s.data, s.dtype, dtype, s.size, 1, state.rank, 1, "S");
  check_view(vh.data, vh.dtype, dtype, vh.rows, vh.cols, state.rank, n, "Vh");
  STRUCTMAT_CHECK(info != nullptr, "streaming_svd: info is null");
  context.device == Device::cuda ? streaming_svd_result_cuda(context, state, seed, s, vh, info)
                                 : streaming_svd_result_cpu(context, state, seed, s, vh, info);
}

std::size_t streaming_svd_workspace(const Context& context, const StreamingSvdState& state) {
  return context.device == Device::cuda ? streaming_svd_workspace_cuda(state) : 0;
}

}  // namespace structmat
