# SPDX-License-Identifier: Apache-2.0
"""Truncated singular value decomposition."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class SVDInfo:
    """Facts about a decomposition, read from the device when one is asked for.

    Attributes:
        rank: singular values above ``max(m, n) eps S[0]``, at most the rank asked for.
        sweeps: passes made over the matrix.
        error: estimate of ``||A - U diag(S) Vh||_F / ||A||_F``.
        converged: no tolerance was missed; always true where only a rank was asked for.

    Example:
        >>> import torch, structmat as sm
        >>> info = sm.linalg.randomized_svd(torch.eye(9)[:, :3], 3).info
        >>> info.rank, info.sweeps, info.converged
        (3, 2, True)
    """

    converged = True

    def __init__(self, facts: Tensor) -> None:
        self._facts = facts  # error, norm, rank, sweeps, finite: SvdInfo of structmat/svd.h

    @property
    def error(self) -> float:
        return float(self._facts[0])

    @property
    def rank(self) -> int:
        return self._count(2)

    @property
    def sweeps(self) -> int:
        return self._count(3)

    def _count(self, fact: int) -> int:
        value = float(self._facts[fact])
        return 0 if math.isnan(value) else int(value)  # NaN: there was no result, in a graph

    def __repr__(self) -> str:
        return (
            f"SVDInfo(rank={self.rank}, sweeps={self.sweeps}, error={self.error:.3g}, "
            f"converged={self.converged})"
        )


class _Factors(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class SVDResult(_Factors):
    """The triple ``U (m, k)``, ``S (k,)``, ``Vh (k, n)`` with ``.info``, an :class:`SVDInfo`.

    Example:
        >>> import torch, structmat as sm
        >>> result = sm.linalg.randomized_svd(torch.eye(9)[:, :3], 2)
        >>> U, S, Vh = result
        >>> result.S is S, tuple(U.shape), tuple(Vh.shape)
        (True, (9, 2), (2, 3))
    """

    info: SVDInfo


def randomized_svd(
    A: Any,
    rank: int | None = None,
    *,
    rtol: float | None = None,
    oversample: int | None = None,
    sweeps: int | None = None,
    center: bool = False,
    seed: int = 0,
    group: Any = None,
) -> SVDResult:
    """The leading singular triplets of a matrix, from a few products with it.

    ``A = U diag(S) Vh`` up to what rank ``k`` leaves, as the first ``k`` triplets of
    ``torch.linalg.svd(A, full_matrices=False)``. A random block of ``rank + oversample`` columns
    is multiplied by ``A`` and ``A^T`` in turn, ``sweeps`` times in all; the last four products
    build a block Krylov space, on which the singular value problem is solved exactly.

    Args:
        A: ``(m, n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device, with any
            strides: a transpose or a slice is read where it lies. Neither copied nor changed.
        rank: ``k``, 1 to ``min(m, n)``.
        oversample: columns beyond ``rank``. By default at least 8, up to a block of a multiple of
            16 columns, which costs no time.
        sweeps: passes over ``A``, at least 2; 5 by default. With 5 the error is within 1 % of the
            least a matrix of this rank can have for singular values that fall like ``i^-1/2`` or
            faster (`docs/svd.md` has the table). Two more passes divide the excess by about 7.
            Where ``rank + oversample`` nearly fills the smaller dimension the result is exact
            and takes 2.
        seed: of the random block, 0 to 2^63 - 1. The same inputs give the same bits for any number
            of threads.

    Returns:
        :class:`SVDResult`, which unpacks as ``U (m, k)``, ``S (k,)`` descending, ``Vh (k, n)``, of
        A's dtype, float32 for 16-bit ``A``. U and Vh are orthonormal to rounding whatever ``A`` is.
        The entry of largest magnitude in each column of ``U`` is positive.

        ``.info.error`` estimates ``||A - U diag(S) Vh||_F / ||A||_F`` from
        ``||A||_F^2 - ||A^T Q||_F^2``, sums in float64, and the singular values left out. Where the
        result is not exact it is never reported below sqrt(8 eps) (9.8e-4 in float32, 4.2e-8
        in float64), where rounding in the products would hide the difference.

    Raises:
        TypeError: ``A`` is not a tensor, or of another dtype.
        ValueError: ``A`` is empty or has not 2 dimensions; rank, oversample, sweeps or seed is out
            of range.
        torch.linalg.LinAlgError: ``A`` contains NaN or Inf, or a singular value or the norm exceeds
            the range of its type. In a compiled or captured graph there is no exception: the result
            is NaN.
        RuntimeError: ``A`` requires grad; gradients are not defined yet. Pass ``A.detach()``.

    Cost: ``2 m n l`` FLOPs a sweep, ``l = rank + oversample``, and ``O((m + n) l^2 + l^3)``. Memory
    beyond ``A``: ``2 (m + 2 n) l`` numbers for ``m >= n``; on the CPU up to ``m l`` more for sums,
    on CUDA ``m l + 24 l^2`` float64 numbers, 32 MB for cuBLAS and, where ``A`` is 16-bit or has two
    strides, 64 or 128 MB to convert it in parts.

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), sections 4.5 and 5.1; Musco and Musco,
    NIPS 2015 (block Krylov); Fukaya et al., SIAM J. Sci. Comput. 42 (2020) (CholeskyQR).

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.randn(300, 8) @ torch.randn(8, 200)
        >>> U, S, Vh = sm.linalg.randomized_svd(A, 8)
        >>> torch.allclose((U * S) @ Vh, A, atol=1e-3)
        True
    """
    dense = isinstance(A, Tensor) and A.layout == torch.strided
    if group is not None or not dense or hasattr(A, "device_mesh"):  # a DTensor has one
        from .matrix_free import randomized_svd as matrix_free_svd

        return matrix_free_svd(A, rank, rtol, oversample, sweeps, center, seed, group)
    if rank is None or rtol is not None or center:
        raise ValueError("randomized_svd: rtol and center need a sparse tensor or an operator")
    _check(A, rank, oversample, sweeps, seed)
    U, S, Vh, facts = torch.ops.structmat.randomized_svd.default(A, rank, oversample, sweeps, seed)
    in_graph = torch.compiler.is_compiling() or (
        A.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    if not in_graph and not float(facts[4]):
        reason = (
            "a singular value or the norm exceeds the range of its dtype, or the iteration did "
            "not converge"
            if bool(A.isfinite().all())
            else "A contains NaN or Inf"
        )
        raise torch.linalg.LinAlgError(f"randomized_svd: {reason}")  # type: ignore[attr-defined]
    result = SVDResult(U, S, Vh)
    result.info = SVDInfo(facts)
    return result


def _check(A: Any, rank: int, oversample: int | None, sweeps: int | None, seed: int) -> None:
    """Raises for arguments the operator does not take."""
    op = "randomized_svd"
    if not isinstance(A, Tensor):
        raise TypeError(f"{op}: A must be a tensor, got {type(A).__name__}")
    if A.layout != torch.strided:
        raise TypeError(f"{op}: A must be dense, got layout {A.layout}")
    if A.dtype not in _DTYPES:
        raise TypeError(f"{op}: A is {A.dtype}, wanted one of " + ", ".join(map(str, _DTYPES)))
    if A.dim() != 2:
        raise ValueError(f"{op}: A must have 2 dimensions, got {A.dim()}")
    if A.numel() == 0:
        raise ValueError(f"{op}: A is empty, shape {tuple(A.shape)}")
    if A.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: A requires grad, but has no gradient here; pass A.detach()")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(f"{op}: there is no rule for torch.func transforms and forward mode")
    for name, value in (
        ("rank", rank),
        ("seed", seed),
        ("oversample", oversample),
        ("sweeps", sweeps),
    ):
        optional = name in ("oversample", "sweeps")
        if not (isinstance(value, int) and not isinstance(value, bool)) and not (
            optional and value is None
        ):
            raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not 1 <= rank <= min(A.shape):
        raise ValueError(
            f"{op}: rank is {rank}, wanted 1 to {min(A.shape)} for A of shape {tuple(A.shape)}"
        )
    if oversample is not None and oversample < 0:
        raise ValueError(f"{op}: oversample is {oversample}, wanted at least 0")
    if sweeps is not None and sweeps < 2:
        raise ValueError(
            f"{op}: sweeps is {sweeps}, wanted at least 2 (one pass finds a range, one more the "
            "factors)"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")


@torch.library.register_fake("structmat::randomized_svd")
def _(
    A: Tensor, rank: int, oversample: int | None, sweeps: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    m, n = A.shape
    return (
        A.new_empty((m, rank), dtype=dtype),
        A.new_empty((rank,), dtype=dtype),
        A.new_empty((rank, n), dtype=dtype),
        A.new_empty((5,), dtype=torch.float64),
    )
