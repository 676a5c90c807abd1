# SPDX-License-Identifier: Apache-2.0
"""cuSOLVER's randomized SVD, cusolverDnXgesvdr, by ctypes: torch has no call for it."""

import ctypes
from ctypes import byref, c_byte, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

import torch

LIBRARIES = ("libcusolver.so.12", "libcusolver.so.11")
CUDA_TYPES = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F

SHAPE = [c_void_p, c_void_p, c_byte, c_byte, *[c_int64] * 5]  # handle, params, jobs, m n k p niters
OPERANDS = [c_int, c_void_p, c_int64, c_int, c_void_p, *[c_int, c_void_p, c_int64] * 2, c_int]
SIGNATURES = {
    "cusolverDnCreate": [c_void_p],
    "cusolverDnSetStream": [c_void_p, c_void_p],
    "cusolverDnCreateParams": [c_void_p],
    "cusolverDnXgesvdr_bufferSize": [*SHAPE, *OPERANDS, c_void_p, c_void_p],
    "cusolverDnXgesvdr": [*SHAPE, *OPERANDS, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p],
}


def load() -> ctypes.CDLL:
    """The library torch uses; OSError where there is none."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    wheels = [str(p) for name in LIBRARIES for f in folders for p in f.glob(f"*/lib/{name}")]
    for name in [*LIBRARIES, *wheels]:  # the first are found where they are loaded already
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"neither {' nor '.join(LIBRARIES)} can be loaded")


class Gesvdr:
    """Rank-k factors of A (m, n), from `oversample` more columns and `power_steps` of A^T A."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.library = library or load()
        for name, arguments in SIGNATURES.items():
            getattr(self.library, name).argtypes = arguments
        self.handle, self.params = c_void_p(), c_void_p()
        self.call("cusolverDnCreate", byref(self.handle))
        self.call("cusolverDnCreateParams", byref(self.params))

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed with cuSOLVER status {status}")

    def __call__(
        self, A: torch.Tensor, k: int, oversample: int = 10, power_steps: int = 2
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if A.shape[0] < A.shape[1]:  # cuSOLVER gets a tall matrix
            V, S, Uh = self(A.T, k, oversample, power_steps)
            return Uh.T, S, V.T
        m, n = A.shape
        columns = A.T.clone(memory_format=torch.contiguous_format)  # by columns; it is overwritten
        kind = CUDA_TYPES[A.dtype]
        p = min(oversample, n - k - 1)
        # U and V by columns; with room for all that it computes, as k are not said to be enough.
        U, S, V = A.new_empty(k + p, m), A.new_empty(k + p), A.new_empty(k + p, n)
        shape = (self.handle, self.params, ord("S"), ord("S"), m, n, k, p, power_steps)
        operands = (
            *(kind, columns.data_ptr(), m),
            *(kind, S.data_ptr()),
            *(kind, U.data_ptr(), m),
            *(kind, V.data_ptr(), n),
            kind,
        )
        if A.is_cuda:
            stream = torch.cuda.current_stream(A.device).cuda_stream
            self.call("cusolverDnSetStream", self.handle, stream)
        on_device, on_host = c_size_t(), c_size_t()
        self.call(
            "cusolverDnXgesvdr_bufferSize", *shape, *operands, byref(on_device), byref(on_host)
        )
        work = A.new_empty(max(1, on_device.value), dtype=torch.uint8)
        host = torch.empty(max(1, on_host.value), dtype=torch.uint8)
        info = A.new_empty(1, dtype=torch.int32)
        self.call(
            "cusolverDnXgesvdr",
            *(*shape, *operands, work.data_ptr(), on_device.value),
            *(host.data_ptr(), on_host.value, info.data_ptr()),
        )
        if int(info) != 0:  # waits: the host's work space must live until then
            raise RuntimeError(f"cusolverDnXgesvdr: info is {int(info)}")
        return U[:k].T, S[:k], V[:k]
