// SPDX-License-Identifier: Apache-2.0
// Reads a .safetensors file: 8 bytes of header length, a JSON object of name -> {dtype, shape,
// data_offsets}, then the data. Strict: whatever the format does not allow throws.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace safetensors {

struct Tensor {
  std::string dtype;  // "F32", "F64", "BF16", "F16", ...
  std::vector<std::int64_t> shape;
  std::vector<unsigned char> data;  // row-major
};

using File = std::map<std::string, Tensor>;

// Throws std::runtime_error naming the file and what is wrong with it.
File load(const std::string& path);
void save(const std::string& path, const File& tensors);

}  // namespace safetensors
