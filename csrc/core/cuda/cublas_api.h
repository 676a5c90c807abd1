// SPDX-License-Identifier: Apache-2.0
// The part of cuBLASLt the core calls, loaded at first use, so that libstructmat needs cuBLAS
// neither to build nor to load. tests/cpp/cublas_api_check.cpp compares these declarations with
// NVIDIA's header.
#pragma once
#include <cstddef>
#include <cstdint>

namespace structmat::cuda {

enum : std::int32_t { kCudaR32F = 0, kCudaR64F = 1, kCudaR16F = 2, kCudaR16BF = 14 };
enum : std::int32_t { kCublasCompute32F = 68, kCublasCompute64F = 70 };
enum : std::int32_t { kCublasOpN = 0, kCublasOpT = 1 };
enum : std::int32_t { kCublasStatusNotSupported = 15 };
enum : std::int32_t {
  kDescTransA = 3,
  kDescTransB = 4,
  kDescEpilogue = 7,
  kDescBiasPointer = 8,
  kDescBiasDataType = 26
};
enum : std::uint32_t { kEpilogueDefault = 1, kEpilogueBias = 4 };
enum : std::int32_t {
  kPrefMaxWorkspaceBytes = 1,
  kPrefReductionSchemeMask = 3,
  kPrefMinAlignmentA = 5,
  kPrefMinAlignmentB = 6,
  kPrefMinAlignmentC = 7,
  kPrefMinAlignmentD = 8
};
enum : std::uint32_t { kReductionComputeType = 2 };

struct CublasLtAlgo {
  std::uint64_t data[8];
};
struct CublasLtHeuristicResult {
  CublasLtAlgo algo;
  std::size_t workspace_bytes;
  std::int32_t state;
  float waves;
  std::int32_t reserved[4];
};

// Handles and descriptors are opaque pointers; every function returns a cublasStatus_t, 0 for
// success.
struct CublasLt {
  int (*create)(void** handle);
  int (*desc_create)(void** desc, int compute_type, int scale_type);
  int (*desc_destroy)(void* desc);
  int (*desc_set)(void* desc, int attribute, const void* value, std::size_t bytes);
  int (*layout_create)(void** layout, int type, std::uint64_t rows, std::uint64_t cols,
                       std::int64_t ld);
  int (*layout_destroy)(void* layout);
  int (*preference_create)(void** preference);
  int (*preference_destroy)(void* preference);
  int (*preference_set)(void* preference, int attribute, const void* value, std::size_t bytes);
  int (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                   int wanted, void* results, int* found);
  int (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout,
                const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                void* d, void* d_layout, const void* algo, void* workspace,
                std::size_t workspace_bytes, void* stream);
};

// Throws Error naming the libraries it looked for.
const CublasLt& cublas_lt();

}  // namespace structmat::cuda
