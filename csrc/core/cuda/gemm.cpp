// SPDX-License-Identifier: Apache-2.0
// gemm() by cublasLtMatmul. Row-major C (m, n) is column-major C^T (n, m) = op(B)^T op(A)^T, whose
// bias runs along the column: cuBLAS's own bias epilogue.
#include "cuda/gemm.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>

#include "cuda/cublas_api.h"
#include "structmat/error.h"

namespace structmat::cuda {
namespace {

void check(int status, const char* call) {
  STRUCTMAT_CHECK(status == 0, std::string("structmat: ") + call + " failed with cuBLAS status " +
                                   std::to_string(status));
}
void check(cudaError_t status, const char* call) {
  STRUCTMAT_CHECK(status == cudaSuccess,
                  std::string("structmat: ") + call + " failed: " + cudaGetErrorString(status));
}

// A handle belongs to one device, serves all threads and lives as long as the process.
void* handle_of_current_device() {
  static std::mutex mutex;
  static std::map<int, void*> handles;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  void*& handle = handles[device];
  if (handle == nullptr) check(cublas_lt().create(&handle), "cublasLtCreate");
  return handle;
}

// An opaque object of cuBLASLt and the function that frees it.
class Object {
 public:
  explicit Object(int (*destroy)(void*)) : destroy_(destroy) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (object_ != nullptr) destroy_(object_);
  }
  void** address() { return &object_; }
  operator void*() const { return object_; }

 private:
  int (*destroy_)(void*);
  void* object_ = nullptr;
};

int cuda_type(DType dtype) {
  return dtype == DType::f32    ? kCudaR32F
         : dtype == DType::f64  ? kCudaR64F
         : dtype == DType::bf16 ? kCudaR16BF
                                : kCudaR16F;
}

std::uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  return static_cast<std::uint32_t>(
      address == 0 ? 256 : std::min<std::uintptr_t>(256, address & -address));
}

// Every row of C = bias, by doubling copies: for what no epilogue covers.
void fill_rows(const Gemm& g, cudaStream_t stream) {
  const std::size_t element = size_of(g.out), width = element * static_cast<std::size_t>(g.n),
                    pitch = element * static_cast<std::size_t>(g.ldc);
  auto* c = static_cast<char*>(g.c);
  check(cudaMemcpyAsync(c, g.bias, width, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
  for (std::int64_t done = 1; done < g.m;) {
    const auto rows = static_cast<std::size_t>(std::min(done, g.m - done));
    check(cudaMemcpy2DAsync(c + static_cast<std::size_t>(done) * pitch, pitch, c, pitch, width,
                            rows, cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpy2DAsync");
    done += static_cast<std::int64_t>(rows);
  }
}

void without_inner_dimension(const Gemm& g, cudaStream_t stream) {
  STRUCTMAT_CHECK(g.beta == 0, "structmat: gemm: k = 0 takes beta = 0 only");
  if (g.bias != nullptr) return fill_rows(g, stream);
  const std::size_t element = size_of(g.out);
  check(cudaMemset2DAsync(g.c, element * static_cast<std::size_t>(g.ldc), 0,
                          element * static_cast<std::size_t>(g.n), static_cast<std::size_t>(g.m),
                          stream),
        "cudaMemset2DAsync");
}

// False when cuBLAS has no algorithm for it.
bool matmul(const Gemm& g, void* workspace, cudaStream_t stream) {
  const CublasLt& lt = cublas_lt();
  const bool f64 = g.dtype == DType::f64;
  Object desc(lt.desc_destroy), a(lt.layout_destroy), b(lt.layout_destroy), c(lt.layout_destroy);
  check(lt.desc_create(desc.address(), f64 ? kCublasCompute64F : kCublasCompute32F,
                       f64 ? kCudaR64F : kCudaR32F),
        "cublasLtMatmulDescCreate");
  const auto set = [&](int attribute, auto value) {
    check(lt.desc_set(desc, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  };
  // cuBLAS's A is our B and the other way round.
  set(kDescTransA, std::int32_t{g.trans_b ? kCublasOpT : kCublasOpN});
  set(kDescTransB, std::int32_t{g.trans_a ? kCublasOpT : kCublasOpN});
  if (g.bias != nullptr) {
    set(kDescEpilogue, std::uint32_t{kEpilogueBias});
    set(kDescBiasPointer, g.bias);
    set(kDescBiasDataType, std::int32_t{cuda_type(g.out)});
  }
  const auto layout = [&](Object& object, DType dtype, std::int64_t rows, std::int64_t cols,
                          std::int64_t ld) {
    check(lt.layout_create(object.address(), cuda_type(dtype), static_cast<std::uint64_t>(rows),
                           static_cast<std::uint64_t>(cols), ld),
          "cublasLtMatrixLayoutCreate");
  };
  layout(a, g.dtype, g.trans_b ? g.k : g.n, g.trans_b ? g.n : g.k, g.ldb);
  layout(b, g.dtype, g.trans_a ? g.m : g.k, g.trans_a ? g.k : g.m, g.lda);
  layout(c, g.out, g.n, g.m, g.ldc);

  Object preference(lt.preference_destroy);
  check(lt.preference_create(preference.address()), "cublasLtMatmulPreferenceCreate");
  const auto prefer = [&](int attribute, auto value) {
    check(lt.preference_set(preference, attribute, &value, sizeof value),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  const std::uint32_t out_alignment = std::min(alignment_of(g.c), alignment_of(g.bias));
  prefer(kPrefMaxWorkspaceBytes, kGemmWorkspace);
  // Partial sums stay in the type of the sum: 16-bit results are rounded once.
  prefer(kPrefReductionSchemeMask, std::uint32_t{kReductionComputeType});
  prefer(kPrefMinAlignmentA, alignment_of(g.b));
  prefer(kPrefMinAlignmentB, alignment_of(g.a));
  prefer(kPrefMinAlignmentC, out_alignment);
  prefer(kPrefMinAlignmentD, out_alignment);

  void* handle = handle_of_current_device();
  CublasLtHeuristicResult result{};
  int found = 0;  // cuBLASLt caches its heuristic: asking again costs little
  const int status = lt.heuristic(handle, desc, a, b, c, c, preference, 1, &result, &found);
  // A bias is refused with other statuses too, and then added beforehand.
  if (status == kCublasStatusNotSupported || (status != 0 && g.bias != nullptr)) return false;
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  if (found == 0 || result.state != 0) return false;

  const float alpha32 = static_cast<float>(g.alpha), beta32 = static_cast<float>(g.beta);
  const void* alpha = f64 ? static_cast<const void*>(&g.alpha) : &alpha32;
  const void* beta = f64 ? static_cast<const void*>(&g.beta) : &beta32;
  check(lt.matmul(handle, desc, alpha, g.b, a, g.a, b, beta, g.c, c, g.c, c, &result.algo,
                  workspace, kGemmWorkspace, stream),
        "cublasLtMatmul");
  return true;
}

}  // namespace

void gemm(const Context& context, const Gemm& product, void* workspace) {
  if (product.m == 0 || product.n == 0) return;
  auto* stream = static_cast<cudaStream_t>(context.stream);
  if (product.k == 0) return without_inner_dimension(product, stream);
  if (matmul(product, workspace, stream)) return;
  if (product.bias != nullptr && product.beta == 0) {
    fill_rows(product, stream);
    Gemm onto_bias = product;
    onto_bias.bias = nullptr;
    onto_bias.beta = 1;
    if (matmul(onto_bias, workspace, stream)) return;
  }
  detail::fail("structmat: cuBLAS has no algorithm for a " + std::to_string(product.m) + " x " +
               std::to_string(product.n) + " x " + std::to_string(product.k) + " product of " +
               name_of(product.dtype));
}

}  // namespace structmat::cuda
