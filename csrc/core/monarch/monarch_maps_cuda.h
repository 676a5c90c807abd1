// SPDX-License-Identifier: Apache-2.0
// The six products of a Monarch matrix and its gradients, as strided products: the permutation
// between the factors is in their maps.
#pragma once
#include <utility>

#include "cuda/strided_product.h"
#include "monarch/monarch_sizes.h"

namespace structmat::monarch {

// Along their rows weights are read by 16 bytes, or number by number a stride apart; or a row is
// made of runs.
enum class WeightRows { packs, strided, runs };

// h lies in memory as (J, T, S), dh as (K, T, Q): each is written in runs of R numbers and read as
// rows. Where J divides Q the interleaved form is the canonical one with other strides, unit
// q = r J + j; `Maps` takes it for that.
class Maps {
 public:
  Maps(const MonarchWeights& w, std::int64_t tokens, DType dtype)
      : s_(w), tokens_(tokens), dtype_(dtype), w1_(w.w1), w2_(w.w2) {
    ragged_ = s_.interleaved_hidden && s_.Q % s_.J != 0;
    R_ = s_.R;  // the only one of W1's rows where the form is ragged
    d1_[0] = R_ * s_.I, d1_[1] = s_.I;
    const std::int64_t q = w.w1.strides[2], unit = w.w2.strides[3];
    if (ragged_)  // those of sizes of one say nothing; a block of W2 may have more than R units
      w1_.strides[1] = R_ * q, w2_.strides[2] = R_ * unit;
    if (!s_.interleaved_hidden || ragged_) return;
    R_ = s_.Q / s_.J;
    w1_.strides[1] = q, w1_.strides[2] = s_.J * q;
    w2_.strides[2] = R_ * unit;
    d1_[0] = s_.I, d1_[1] = s_.J * s_.I;
  }

  // h[t,k,q] = sum_i W1[k,q,i] x[t,k,i]
  cuda::StridedProduct hidden(ConstMatrixView x, void* h) const {
    cuda::StridedProduct p = product(s_.K, tokens_, s_.Q, s_.I);
    p.a = {x.data, linear(s_.I), linear(x.row_stride), linear(1)};
    p.b = w1_rows();
    p.c = {h, linear(R_), linear(s_.S), split(R_, tokens_ * s_.S, 1)};
    if (ragged_) p.c.batch = {}, p.c.col = {tokens_ * s_.S, 1, s_.J, s_.Q, 1};
    return p;
  }
  // y[t,j,l] = sum_s W2[j,l,s] h[t,j,s]
  cuda::StridedProduct output(const void* h, MatrixView y) const {
    cuda::StridedProduct p = product(s_.J, tokens_, s_.L, s_.S);
    p.a = hidden_rows(h);
    p.b = w2_rows();
    p.c = {y.data, block(), linear(y.row_stride), within_block()};
    return p;
  }
  // dh[t,j,s] = sum_l W2[j,l,s] dy[t,j,l]
  cuda::StridedProduct hidden_gradient(ConstMatrixView dy, void* dh) const {
    cuda::StridedProduct p = product(s_.J, tokens_, s_.S, s_.L);
    p.a = {dy.data, block(), linear(dy.row_stride), within_block()};
    p.b = {w2_.data, linear(w2_.strides[0]), w2_unit(), linear(w2_.strides[1])};
    p.c = {dh, linear(R_), linear(s_.Q), split(R_, tokens_ * s_.Q, 1)};
    if (ragged_) p.c.batch = {}, p.c.col = {1, tokens_ * s_.Q, s_.Q, 1, s_.J};
    return p;
  }
  // dx[t,k,i] = sum_q W1[k,q,i] dh[t,k,q]
  cuda::StridedProduct input_gradient(const void* dh, MatrixView dx) const {
    cuda::StridedProduct p = product(s_.K, tokens_, s_.I, s_.Q);
    p.a = {dh, linear(tokens_ * s_.Q), linear(s_.Q), linear(1)};
    p.b = w1_rows();
    std::swap(p.b.row, p.b.col);
    p.c = {dx.data, linear(s_.I), linear(dx.row_stride), linear(1)};
    return p;
  }
  // dW1[k,q,i] = sum_t dh[t,k,q] x[t,k,i]
  cuda::StridedProduct w1_gradient(const void* dh, ConstMatrixView x, void* d1) const {
    cuda::StridedProduct p = product(s_.K, s_.Q, s_.I, tokens_);
    p.tall = true;
    p.a = {dh, linear(tokens_ * s_.Q), linear(1), linear(s_.Q)};
    p.b = {x.data, linear(s_.I), linear(1), linear(x.row_stride)};
    p.c = {d1, linear(s_.Q * s_.I), split(R_, d1_[0], d1_[1]), linear(1)};
    return p;
  }
  // dW2[j,l,s] = sum_t dy[t,j,l] h[t,j,s]
  cuda::StridedProduct w2_gradient(ConstMatrixView dy, const void* h, void* d2) const {
    cuda::StridedProduct p = product(s_.J, s_.L, s_.S, tokens_);
    p.tall = true;
    p.a = {dy.data, block(), within_block(), linear(dy.row_stride)};
    p.b = hidden_rows(h);
    std::swap(p.b.row, p.b.col);
    p.c = {d2, linear(s_.L * s_.S), linear(s_.S), linear(1)};
    return p;
  }
  // How one launch for both products finds the weights.
  WeightRows weight_rows() const {
    const cuda::Operand w1 = w1_rows(), w2 = w2_rows();
    const auto pack = [](const cuda::Operand& w) {
      return cuda::packs(w.data, w.col, w.row, w.batch);
    };
    if (pack(w1) && pack(w2)) return WeightRows::packs;
    return w1.col.divisor == 0 && w2.col.divisor == 0 ? WeightRows::strided : WeightRows::runs;
  }

 private:
  using Axis = cuda::Axis;
  static Axis linear(std::int64_t stride) { return Axis::linear(stride); }
  static Axis split(std::int64_t divisor, std::int64_t high, std::int64_t low) {
    return Axis::split(divisor, high, low);
  }
  cuda::StridedProduct product(std::int64_t batches, std::int64_t rows, std::int64_t cols,
                               std::int64_t inner) const {
    cuda::StridedProduct p;
    p.dtype = dtype_;
    p.batches = batches, p.rows = rows, p.cols = cols, p.inner = inner;
    return p;
  }
  cuda::Operand w1_rows() const {
    return {w1_.data, linear(w1_.strides[0]), split(R_, w1_.strides[1], w1_.strides[2]),
            linear(w1_.strides[3])};
  }
  cuda::Operand w2_rows() const {
    return {w2_.data, linear(w2_.strides[0]), linear(w2_.strides[1]), w2_unit()};
  }
  Axis w2_unit() const { return split(R_, w2_.strides[2], w2_.strides[3]); }
  cuda::Operand hidden_rows(const void* h) const {
    return {h, linear(tokens_ * s_.S), linear(s_.S), linear(1)};
  }
  Axis block() const { return linear(s_.interleaved_output ? 1 : s_.L); }
  Axis within_block() const { return linear(s_.interleaved_output ? s_.J : 1); }

  Sizes s_;
  std::int64_t tokens_;
  DType dtype_;
  ConstArrayView w1_, w2_;  // canonical strides where the form is
  bool ragged_;
  std::int64_t R_, d1_[2];  // strides of j and r in the gradient of W1
};

}  // namespace structmat::monarch
