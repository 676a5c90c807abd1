# SPDX-License-Identifier: Apache-2.0
"""structmat's core on NumPy arrays, without torch (docs/numpy.md)."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

version: str
blas: str
simd: str
cuda: bool
cuda_architectures: str

class Error(ValueError): ...
class LinAlgError(np.linalg.LinAlgError): ...

class Facts(TypedDict):
    error: float
    norm: float
    rank: int
    sweeps: int
    converged: bool

def gaussian(
    rows: int,
    cols: int,
    *,
    seed: int = 0,
    stream: int = 0,
    dtype: DTypeLike = ...,
    threads: int = 0,
) -> Array: ...
@overload
def randomized_svd(
    A: Array,
    rank: int | None = None,
    *,
    rtol: float | None = None,
    oversample: int | None = None,
    sweeps: int | None = None,
    center: bool = False,
    seed: int = 0,
    threads: int = 0,
) -> tuple[Array, Array, Array, Facts]: ...
@overload
def randomized_svd(
    A: list[Array] | tuple[Array, ...],
    rank: int | None = None,
    *,
    rtol: float | None = None,
    oversample: int | None = None,
    sweeps: int | None = None,
    center: bool = False,
    seed: int = 0,
    threads: int = 0,
) -> list[tuple[Array, Array, Array, Facts]]: ...
def svd_tail(
    A: Array, rank: int, *, oversample: int | None = None, seed: int = 0, threads: int = 0
) -> tuple[Array, Array, Array, Facts]: ...
@overload
def orthonormalize(
    Y: Array, *, seed: int = 0, return_rank: Literal[False] = False, threads: int = 0
) -> Array: ...
@overload
def orthonormalize(
    Y: Array, *, seed: int = 0, return_rank: Literal[True], threads: int = 0
) -> tuple[Array, int]: ...
@overload
def gram_matmul(
    A: Array, X: Array, *, return_moments: Literal[False] = False, threads: int = 0
) -> Array: ...
@overload
def gram_matmul(
    A: Array, X: Array, *, return_moments: Literal[True], threads: int = 0
) -> tuple[Array, Array, float]: ...
@overload
def range_step(
    A: Array, Q: Array, *, seed: int = 0, threads: int = 0
) -> tuple[Array, Array, Array]: ...
@overload
def range_step(
    A: list[Array] | tuple[Array, ...],
    Q: list[Array] | tuple[Array, ...],
    *,
    seed: int = 0,
    threads: int = 0,
) -> list[tuple[Array, Array, Array]]: ...

class StreamingSVD:
    def __init__(
        self,
        n_features: int,
        rank: int,
        *,
        decay: float = 1.0,
        center: bool = False,
        seed: int = 0,
        dtype: DTypeLike = ...,
        threads: int = 0,
    ) -> None: ...
    @property
    def n_features(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def decay(self) -> float: ...
    @property
    def center(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def rows_seen(self) -> int: ...
    @property
    def mean(self) -> Array: ...
    def update(self, rows: Any) -> StreamingSVD: ...
    def merge(self, other: StreamingSVD) -> StreamingSVD: ...
    def result(self) -> tuple[Array, Array, Facts]: ...
    def state_dict(self) -> dict[str, Array]: ...
    def load_state_dict(self, state: Mapping[str, Array]) -> StreamingSVD: ...
