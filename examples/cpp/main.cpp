// SPDX-License-Identifier: Apache-2.0
// Runs one compressed layer, y = x V^T U^T + bias, without torch or Python.
//
//   low_rank_layer WEIGHTS.safetensors LAYER [INPUT.safetensors [OUTPUT.safetensors]]
//
// reads the tensors LAYER.U (m, r), LAYER.V (r, n) and, where there is one, LAYER.bias (m,). The
// input is the tensor x (..., n) of INPUT, or four rows of a fixed pattern; OUTPUT receives y (...,
// m).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "safetensors.h"
#include "structmat/structmat.h"

namespace {

using safetensors::File;
using safetensors::Tensor;

const Tensor& find(const File& file, const std::string& name) {
  const auto found = file.find(name);
  if (found == file.end()) throw std::runtime_error("there is no tensor '" + name + "'");
  return found->second;
}

structmat::DType dtype_of(const Tensor& t) {
  for (const auto& [name, dtype] :
       {std::make_pair("F32", structmat::DType::f32), std::make_pair("F64", structmat::DType::f64),
        std::make_pair("BF16", structmat::DType::bf16),
        std::make_pair("F16", structmat::DType::f16)})
    if (t.dtype == name) return dtype;
  throw std::runtime_error("tensors must be F32, F64, BF16 or F16, not " + t.dtype);
}

// Rows are all dimensions but the last.
structmat::MatrixView matrix(Tensor& t) {
  if (t.shape.empty()) throw std::runtime_error("a scalar where a matrix is wanted");
  const auto rows = std::accumulate(t.shape.begin(), t.shape.end() - 1, std::int64_t{1},
                                    std::multiplies<std::int64_t>());
  return {t.data.data(), dtype_of(t), rows, t.shape.back(), t.shape.back()};
}

Tensor pattern(const Tensor& v) {
  if (v.dtype != "F32")
    throw std::runtime_error("give an input: the pattern is F32, the layer " + v.dtype);
  Tensor x{"F32", {4, v.shape.back()}, {}};
  x.data.resize(static_cast<std::size_t>(4 * v.shape.back()) * sizeof(float));
  auto* values = reinterpret_cast<float*>(x.data.data());
  for (std::int64_t i = 0; i < 4 * v.shape.back(); ++i)
    values[i] = static_cast<float>(i % 17 - 8) / 8;
  return x;
}

int run(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::fprintf(stderr, "usage: %s WEIGHTS LAYER [INPUT [OUTPUT]]   (.safetensors files)\n",
                 argv[0]);
    return 2;
  }
  const File weights = safetensors::load(argv[1]);
  const std::string layer = argv[2];
  Tensor u = find(weights, layer + ".U"), v = find(weights, layer + ".V"), bias;
  if (weights.count(layer + ".bias") > 0) bias = find(weights, layer + ".bias");
  if (u.shape.size() != 2 || v.shape.size() != 2 || (!bias.dtype.empty() && bias.shape.size() != 1))
    throw std::runtime_error("U and V must have two dimensions, bias one");
  Tensor x = argc > 3 ? find(safetensors::load(argv[3]), "x") : pattern(v);

  Tensor y{u.dtype, x.shape, {}};
  if (y.shape.empty()) throw std::runtime_error("x must have at least one dimension");
  y.shape.back() = u.shape[0];
  const structmat::MatrixView rows = matrix(x);
  y.data.resize(static_cast<std::size_t>(rows.rows * u.shape[0]) * structmat::size_of(dtype_of(u)));
  structmat::ConstVectorView bias_view;
  if (!bias.dtype.empty()) bias_view = {bias.data.data(), dtype_of(bias), bias.shape[0]};

  // The library checks that shapes and dtypes fit each other.
  const auto begin = std::chrono::steady_clock::now();
  structmat::low_rank_linear(structmat::Context{}, rows, matrix(u), matrix(v), bias_view,
                             matrix(y));
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;

  std::printf("%s: %lld rows, (%lld x %lld) of rank %lld, %s, %.3f ms\n", layer.c_str(),
              static_cast<long long>(rows.rows), static_cast<long long>(u.shape[0]),
              static_cast<long long>(v.shape[1]), static_cast<long long>(v.shape[0]),
              u.dtype.c_str(), took.count());
  if (y.dtype == "F32")
    for (std::int64_t j = 0; j < std::min<std::int64_t>(4, rows.rows * u.shape[0]); ++j)
      std::printf("y[%lld] = %.6g\n", static_cast<long long>(j),
                  static_cast<double>(reinterpret_cast<const float*>(y.data.data())[j]));
  if (argc > 4) safetensors::save(argv[4], {{"y", y}});
  return 0;
}

}  // namespace

int main(int argc, char** argv) try { return run(argc, argv); } catch (const std::exception& e) {
  std::fprintf(stderr, "%s: %s\n", argv[0], e.what());
  return 1;
}
