// SPDX-License-Identifier: Apache-2.0
// Compile only, where NVIDIA's header exists: our declarations of cuBLASLt against the real ones.
#include <cublasLt.h>

#include <type_traits>

#include "cuda/cublas_api.h"

using namespace structmat::cuda;

// Enums are int-sized, opaque objects and streams are void*; all else must agree exactly.
template <class T>
struct Abi {
  using type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
template <class T>
struct Abi<T*> {
  using plain = std::remove_const_t<T>;
  using pointee = std::conditional_t<std::is_class_v<plain>, void, plain>;
  using type = std::conditional_t<std::is_const_v<T>, const pointee*, pointee*>;
};
template <class T>
struct Abi<T**> {
  using type = void**;
};
template <>
struct Abi<const cublasLtMatmulAlgo_t*> {
  using type = const void*;
};
template <class R, class... A>
auto abi(R (*)(A...)) -> typename Abi<R>::type (*)(typename Abi<A>::type...);
#define SAME(member, symbol) \
  static_assert(std::is_same_v<decltype(CublasLt::member), decltype(abi(&symbol))>, #symbol)

SAME(create, cublasLtCreate);
SAME(desc_create, cublasLtMatmulDescCreate);
SAME(desc_destroy, cublasLtMatmulDescDestroy);
SAME(desc_set, cublasLtMatmulDescSetAttribute);
SAME(layout_create, cublasLtMatrixLayoutCreate);
SAME(layout_destroy, cublasLtMatrixLayoutDestroy);
SAME(preference_create, cublasLtMatmulPreferenceCreate);
SAME(preference_destroy, cublasLtMatmulPreferenceDestroy);
SAME(preference_set, cublasLtMatmulPreferenceSetAttribute);
SAME(heuristic, cublasLtMatmulAlgoGetHeuristic);
SAME(matmul, cublasLtMatmul);

#define EQUAL(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs))
EQUAL(kCudaR32F, CUDA_R_32F);
EQUAL(kCudaR64F, CUDA_R_64F);
EQUAL(kCudaR16F, CUDA_R_16F);
EQUAL(kCudaR16BF, CUDA_R_16BF);
EQUAL(kCublasCompute32F, CUBLAS_COMPUTE_32F);
EQUAL(kCublasCompute64F, CUBLAS_COMPUTE_64F);
EQUAL(kCublasOpN, CUBLAS_OP_N);
EQUAL(kCublasOpT, CUBLAS_OP_T);
EQUAL(kDescTransA, CUBLASLT_MATMUL_DESC_TRANSA);
EQUAL(kDescTransB, CUBLASLT_MATMUL_DESC_TRANSB);
EQUAL(kDescEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
EQUAL(kDescBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
EQUAL(kDescBiasDataType, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
EQUAL(kEpilogueDefault, CUBLASLT_EPILOGUE_DEFAULT);
EQUAL(kEpilogueBias, CUBLASLT_EPILOGUE_BIAS);
EQUAL(kPrefMaxWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
EQUAL(kPrefReductionSchemeMask, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
EQUAL(kPrefMinAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
EQUAL(kPrefMinAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
EQUAL(kPrefMinAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
EQUAL(kPrefMinAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
EQUAL(kReductionComputeType, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
static_assert(sizeof(cublasStatus_t) == 4 && sizeof(cudaDataType) == 4 &&
              sizeof(cublasComputeType_t) == 4 && sizeof(cublasLtMatmulDescAttributes_t) == 4 &&
              sizeof(cublasLtMatmulPreferenceAttributes_t) == 4);

static_assert(sizeof(CublasLtAlgo) == sizeof(cublasLtMatmulAlgo_t));
using Theirs = cublasLtMatmulHeuristicResult_t;
static_assert(sizeof(CublasLtHeuristicResult) == sizeof(Theirs));
static_assert(offsetof(CublasLtHeuristicResult, workspace_bytes) ==
              offsetof(Theirs, workspaceSize));
static_assert(offsetof(CublasLtHeuristicResult, state) == offsetof(Theirs, state));

int main() {}
