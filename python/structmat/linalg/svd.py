# SPDX-License-Identifier: Apache-2.0
"""Truncated singular value decomposition."""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import svd_gradient  # noqa: F401  (registers the gradient)

_OP = "randomized_svd"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class SVDInfo:
    """Facts about a decomposition, read from the device when one is asked for.

    For a batch each is a tensor of the batch's shape, on its device.

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

    def __init__(self, facts: Tensor) -> None:
        # error, norm, rank, sweeps, finite, converged along the last dimension: SvdInfo of
        # structmat/svd.h
        self._facts = facts

    @property
    def error(self) -> Any:
        error = self._facts[..., 0]
        return error.clone() if error.dim() else float(error)

    @property
    def rank(self) -> Any:
        return self._count(2)

    @property
    def sweeps(self) -> Any:
        return self._count(3)

    @property
    def converged(self) -> Any:
        converged = self._facts[..., 5] != 0
        return converged if converged.dim() else bool(converged)

    def _count(self, fact: int) -> Any:
        value = self._facts[..., fact]
        if value.dim():
            return value.nan_to_num(0).long()
        return 0 if math.isnan(value) else int(value)  # NaN: there was no result, in a graph

    def __repr__(self) -> str:
        if self._facts.dim() > 1:
            return f"SVDInfo of a batch of shape {tuple(self._facts.shape[:-1])}"
        return (
            f"SVDInfo(rank={self.rank}, sweeps={self.sweeps}, error={self.error:.3g}, "
            f"converged={self.converged})"
        )


class _Factors(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class SVDResult(_Factors):
    """The triple ``U (..., m, k)``, ``S (..., k)``, ``Vh (..., k, n)`` with ``.info``, an
    :class:`SVDInfo`.

    Example:
        >>> import torch, structmat as sm
        >>> result = sm.linalg.randomized_svd(torch.eye(9)[:, :3], 2)
        >>> U, S, Vh = result
        >>> result.S is S, tuple(U.shape), tuple(Vh.shape)
        (True, (9, 2), (2, 3))
    """

    info: SVDInfo

    def residuals(self, A: Any, *, center: bool = False) -> Tensor:
        """How well each triplet is determined: an error bound for every singular value.

        ``r_i = max(||A v_i - s_i u_i||, ||A^T u_i - s_i v_i||)``: ``A`` has a singular value within
        ``r_i`` of ``s_i``, and where the next ones are ``g_i > r_i`` away, ``u_i`` and ``v_i`` are
        within an angle of about ``r_i / g_i`` of its vectors. Where ``r_i`` is not below the
        distance to the neighbours the pair is not determined, though their span may be.

        Args:
            A: the matrix ``(m, n)`` decomposed, dense, CSR or an operator.
            center: as it was given.

        Returns:
            ``(k,)``, of the dtype of S. Rounding adds some ``eps S[0]``.

        Raises:
            TypeError: ``A`` is none of these, or its dtype gives no factors of theirs.
            ValueError: ``A`` has another shape than ``U diag(S) Vh``, or is on another device.

        Cost: two products with ``k`` columns, ``4 m n k`` FLOPs.

        Source: Parlett, The Symmetric Eigenvalue Problem (1998), sections 4.5 and 11.7, for
        ``[0 A; A^T 0]``.

        Example:
            >>> import torch, structmat as sm
            >>> A = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
            >>> result = sm.linalg.randomized_svd(A, 2)
            >>> bool((result.residuals(A) < 1e-5).all())
            True
        """
        from .arguments import check_factors, check_matrix
        from .matrix_free import _operand

        U, S, Vh = self
        with torch.no_grad(), torch.autocast(U.device.type, enabled=False):
            check_matrix(A, "residuals")
            check_factors(A, U, Vh)
            operand = _operand(A, None, center)
            if center:
                operand = operand.centred()
            right = operand.matmat(Vh.mT.contiguous()) - U * S
            left = operand.rmatmat(U) - Vh.mT * S
            return torch.maximum(right.norm(dim=0), left.norm(dim=0))


def randomized_svd(
    A: Any,
    rank: int | Sequence[int] | None = None,
    *,
    rtol: float | None = None,
    oversample: int | None = None,
    sweeps: int | None = None,
    center: bool = False,
    seed: int = 0,
    group: Any = None,
) -> Any:
    """The leading singular triplets of a matrix, from a few products with it.

    ``A = U diag(S) Vh`` up to what rank ``k`` leaves, as the first ``k`` triplets of
    ``torch.linalg.svd(A, full_matrices=False)``. Random columns are multiplied by ``A`` and
    ``A^T`` in turn, ``sweeps`` times in all; the last products build a block Krylov space, on which
    the singular value problem is solved exactly.

    Args:
        A: ``(..., m, n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device, with
            any strides: a transpose or a slice is read where it lies. Neither copied nor changed.
            Or a sparse CSR tensor, an object with ``.shape .dtype .device .matmat(X)
            .rmatmat(Y)``, or a DTensor sharded by rows (`docs/out_of_core.md`). Or a list of
            matrices of any shapes and dtypes, dense ones on one device.
        rank: ``k``, 1 to ``min(m, n)``; for a list one number or one for each matrix.
        rtol: in place of a rank, the relative Frobenius error wanted, in (0, 1). The result has the
            least rank for which an upper bound of the error meets it, up to a tenth more.
        oversample: columns beyond ``rank`` in a block. By default at least 8, up to a multiple of
            16 columns, which costs no time.
        sweeps: passes over ``A``, at least 2. By default 5; for ranks above 42 on the CPU, unless
            ``A`` is very tall or wide, 8 to 10 with narrower blocks, which are fewer products.
            Either way the error is within 1 % of the least a matrix of this rank can have for
            singular values that fall like ``i^-1/2`` or faster (`docs/svd.md` has the table). Two
            more passes divide the excess by about 7. Where the basis nearly fills the smaller
            dimension the result is exact and takes 2. With ``rtol`` a bound.
        center: subtract the mean of the rows, the columns' means, without forming ``A - mean``.
            The mean of dense ``A`` leaves as numbers are read, so that nothing is lost where it is
            far larger than what is left.
        seed: of the random columns, 0 to 2^63 - 1, the same for every matrix. The same inputs give
            the same bits for any number of threads, in a batch or list as in a call of their own
            (dense ``A``; the rest, and the gradients of U and Vh, use torch's products).
        group: a ``torch.distributed`` process group; each rank gives its rows of ``A`` and gets
            its rows of ``U``.

    Returns:
        :class:`SVDResult`, which unpacks as ``U (..., m, k)``, ``S (..., k)`` descending,
        ``Vh (..., k, n)``, of A's dtype, float32 for 16-bit ``A``; for a list, one for each matrix.
        U and Vh are orthonormal to rounding whatever ``A`` is. The entry of largest magnitude in
        each column of ``U`` is positive.

        ``.info.error`` estimates ``||A - U diag(S) Vh||_F / ||A||_F``: from the singular values
        left out and ``||A||_F^2 - ||A^T Q||_F^2`` or, where that would cancel, from 8 random
        columns that went along in the last product. It is within a factor 1.25 in 99 % of cases and
        never reported below 16 eps, the rounding of the product. ``.info.converged`` is false
        where ``rtol`` was not met for certain.

    Raises:
        TypeError: ``A`` is none of these, or of another dtype.
        ValueError: a matrix is empty, on meta or has less than 2 dimensions, in a list or with
            ``rtol`` not 2; matrices of a list are on different devices, or the ranks of a
            group have lists of different lengths; neither or both of rank and rtol; rank, rtol,
            oversample, sweeps or seed is out of range.
        torch.linalg.LinAlgError: ``A`` contains NaN or Inf, or a singular value or the norm exceeds
            the range of its type; which matrix of a batch or list, the message says. In a compiled
            or captured graph there is no exception: the result is NaN.
        RuntimeError: under ``torch.func`` transforms and forward-mode differentiation, for second
            derivatives, for gradients of U and Vh while a CUDA graph is captured, and for an ``A``
            that requires grad where it is not dense or `group` is given. With `rtol` on CUDA while
            a graph is captured: the rank is not known before the host has looked.

    U, S and Vh have gradients, those of the exact truncated decomposition at the vectors found:
    they are as accurate as these, so that slowly falling singular values ask for more sweeps. With
    ``A = U S Vh + E`` the part that comes from ``E`` is included, by an iteration in products with
    ``A``. Close or equal singular values among the ``k`` do no harm where the loss does not depend
    on how they are split, except that of a product ``U S Vh`` at values equal to rounding the
    entries between these are left out. Where ``S[k-1]`` is equal to the next value left out, or the
    vectors do not tell the two apart, the gradient of vectors next to the cut does not exist: what
    comes back is finite, and a warning says so. ``.info`` has no gradient.

    Cost: ``2 m n b`` FLOPs a sweep, ``b = rank + oversample`` or, with narrower blocks, about 3/8
    of the rank, and ``O((m + n) l^2 + l^3)`` for a basis of ``l``, about twice the rank. Memory
    beyond ``A``: ``(m + 2 n) l`` numbers for ``m >= n``; on the CPU up to ``m b`` more for sums, on
    CUDA ``m b + 24 l^2`` float64 numbers, 32 MB for cuBLAS and, where ``A`` is 16-bit, has two
    strides or is centred, 64 or 128 MB to convert it in parts. On the CPU the matrices of a batch
    or list run side by side, one thread each, and each running one takes this memory. With `rtol`
    ``4 m n l`` FLOPs: two passes for a basis of 48, 10 for 320, 16 for 608, from three times the
    rank (ranks to 16) down to 1.3 times (large ones); while it grows, up to three times its memory.

    The gradient of S alone is ``U diag(dS) Vh``. That of vectors takes 9 passes over ``A`` with as
    many columns as have a gradient (at least 8), and two more a step with those not yet solved, up
    to 200 steps, usually 10 to 15 passes in all, and about
    ``20 min(m, n) k`` numbers.

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), sections 4.5 and 5.1; Musco and Musco,
    NIPS 2015 (block Krylov); Fukaya et al., SIAM J. Sci. Comput. 42 (2020) (CholeskyQR). Gradient:
    Townsend, Differentiating the singular value decomposition (2016), with the system for what is
    outside the leading vectors solved by a deflated conjugate gradient method.

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.randn(300, 8) @ torch.randn(8, 200)
        >>> U, S, Vh = sm.linalg.randomized_svd(A, 8)
        >>> torch.allclose((U * S) @ Vh, A, atol=1e-3)
        True
        >>> result = sm.linalg.randomized_svd(A + 3, rtol=1e-3, center=True)
        >>> len(result.S), result.info.converged
        (8, True)
        >>> layers = [torch.randn(64, 32), torch.randn(32, 96)]
        >>> [tuple(result.U.shape) for result in sm.linalg.randomized_svd(layers, 4)]
        [(64, 4), (32, 4)]
    """
    if isinstance(A, Sequence) and not isinstance(A, (Tensor, str, bytes)):  # a path is refused
        if rtol is None and group is None and all(map(_is_dense, A)):
            check_options(oversample, sweeps, seed, center)
            return _of_list(list(A), rank, oversample, sweeps, seed, center)
        more: dict[str, Any] = {"rtol": rtol, "center": center, "group": group, "seed": seed}
        more |= {"oversample": oversample, "sweeps": sweeps}
        if group is not None or not all(map(_is_dense, A)):
            from .matrix_free import require_one_length

            require_one_length(A, group, lambda: _ranks(rank, len(A)))
        ranks = _ranks(rank, len(A))
        return [_of_item(i, a, k, more) for i, (a, k) in enumerate(zip(A, ranks, strict=True))]
    if group is not None or not _is_dense(A):
        from .matrix_free import randomized_svd as matrix_free_svd

        number: Any = rank  # matrix_free refuses a sequence
        return matrix_free_svd(A, number, rtol, oversample, sweeps, center, seed, group)
    check_options(oversample, sweeps, seed, center)
    if rtol is not None or rank is None:
        return _to_tolerance(A, rank, rtol, oversample, sweeps, seed, center)
    _check(A)
    _check_rank(A, rank)
    U, S, Vh, facts = torch.ops.structmat.randomized_svd.default(
        A, rank, oversample, sweeps, seed, center
    )
    _require_finite(A, facts)
    return _result(U, S, Vh, facts)


def _is_dense(A: Any) -> bool:
    """Whether the core takes it: no sparse tensor, DTensor or operator."""
    return isinstance(A, Tensor) and A.layout == torch.strided and not hasattr(A, "device_mesh")


def _of_item(index: int, A: Any, rank: Any, options: dict[str, Any]) -> SVDResult:
    """Of an item of a list that the core does not take."""
    try:
        result: SVDResult = randomized_svd(A, rank, **options)
    except (TypeError, ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise type(error)(f"{error} (A[{index}] of the list)") from None
    return result


def _ranks(rank: Any, count: int) -> list[Any]:
    ranks = list(rank) if isinstance(rank, Sequence) else [rank] * count
    if len(ranks) != count:
        raise ValueError(f"{_OP}: {len(ranks)} ranks for a list of {count} matrices")
    return ranks


def _to_tolerance(
    A: Tensor,
    rank: Any,
    rtol: Any,
    oversample: int | None,
    sweeps: int | None,
    seed: int,
    center: bool,
) -> SVDResult:
    """Of one dense matrix, to the least rank for which the error is at most rtol."""
    check_target(rank, rtol)
    _check(A)
    if A.dim() > 2:
        raise ValueError(f"{_OP}: with rtol every matrix has a rank of its own; wanted list(A)")
    U, S, Vh, facts = torch.ops.structmat.randomized_svd_to_tolerance.default(
        A, float(rtol), oversample, sweeps, seed, center
    )
    _require_finite(A, facts)
    return _result(U, S, Vh, facts)


def _of_list(
    A: list[Tensor],
    rank: Any,
    oversample: int | None,
    sweeps: int | None,
    seed: int,
    center: bool,
) -> list[SVDResult]:
    ranks = _ranks(rank, len(A))
    each = isinstance(rank, Sequence)
    for i, (a, k) in enumerate(zip(A, ranks, strict=True)):
        _check(a, f"A[{i}]")
        _check_rank(a, k, f"A[{i}]", f"rank[{i}]" if each else "rank")
        if a.dim() != 2:
            raise ValueError(f"{_OP}: A[{i}] must have 2 dimensions in a list, got {a.dim()}")
        if a.device != A[0].device:
            raise ValueError(f"{_OP}: A[{i}] is on {a.device}, A[0] on {A[0].device}")
    if not A:
        return []
    *factors, facts = torch.ops.structmat.randomized_svd_list.default(
        A, ranks, oversample, sweeps, seed, center
    )
    _require_finite(A, facts)
    results = [_result(*one) for one in zip(*factors, facts.unbind(), strict=True)]
    for i, a in enumerate(A):  # one that requires grad makes all results do
        if not a.requires_grad and results[i].S.requires_grad:
            U, S, Vh = (t.detach() for t in results[i])
            results[i] = _result(U, S, Vh, facts[i])
    return results


def _result(U: Tensor, S: Tensor, Vh: Tensor, facts: Tensor) -> SVDResult:
    result = SVDResult(U, S, Vh)
    result.info = SVDInfo(facts.detach())
    return result


def _require_finite(A: Tensor | list[Tensor], facts: Tensor) -> None:
    """Raises for the first matrix of a batch or list that has no decomposition."""
    if torch.compiler.is_compiling() or (
        facts.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        return
    missing = (facts.detach()[..., 4] == 0).nonzero()
    if not len(missing):
        return
    index = tuple(missing[0].tolist())
    matrix = A[index] if isinstance(A, Tensor) else A[index[0]]
    name = f"A[{', '.join(map(str, index))}]" if index else "A"
    reason = (
        "a singular value or the norm exceeds the range of its dtype, or the iteration did not "
        "converge" + (f", of {name}" if index else "")
        if bool(matrix.isfinite().all())
        else f"{name} contains NaN or Inf"
    )
    raise torch.linalg.LinAlgError(f"{_OP}: {reason}")  # type: ignore[attr-defined]


def _check(A: Any, name: str = "A") -> None:
    """Raises for a matrix or a batch that the operators do not take."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor, got {type(A).__name__}")
    if A.layout != torch.strided:
        raise TypeError(f"{_OP}: {name} must be dense, got layout {A.layout}")
    if A.dtype not in _DTYPES:
        raise TypeError(f"{_OP}: {name} is {A.dtype}, wanted one of {', '.join(map(str, _DTYPES))}")
    if A.dim() < 2:
        raise ValueError(f"{_OP}: {name} must have at least 2 dimensions, got {A.dim()}")
    if 0 in A.shape[-2:]:
        raise ValueError(f"{_OP}: {name} is empty, shape {tuple(A.shape)}")
    check_not_meta(name, A.device)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(f"{_OP}: there is no rule for torch.func transforms and forward mode")


def _check_rank(A: Tensor, rank: Any, name: str = "A", rank_name: str = "rank") -> None:
    check_integer(rank_name, rank)
    if not 1 <= rank <= min(A.shape[-2:]):
        raise ValueError(
            f"{_OP}: {rank_name} is {rank}, wanted 1 to {min(A.shape[-2:])} for {name} of shape "
            f"{tuple(A.shape)}"
        )


def check_target(rank: Any, rtol: Any) -> None:
    if rtol is not None and (not isinstance(rtol, Real) or isinstance(rtol, bool)):
        raise TypeError(f"{_OP}: rtol must be a number, got {type(rtol).__name__}")
    if (rank is None) == (rtol is None):
        both = "neither" if rank is None else "both"
        raise ValueError(f"{_OP}: wanted one of rank and rtol, got {both}")
    if rtol is not None and not 0 < float(rtol) < 1:
        raise ValueError(f"{_OP}: rtol is {rtol}, wanted more than 0 and less than 1")


def check_options(oversample: Any, sweeps: Any, seed: Any, center: Any) -> None:
    if not isinstance(center, bool):
        raise TypeError(f"{_OP}: center must be a bool, got {type(center).__name__}")
    for name, value in (("seed", seed), ("oversample", oversample), ("sweeps", sweeps)):
        if value is not None or name == "seed":
            check_integer(name, value)
    if oversample is not None and oversample < 0:
        raise ValueError(f"{_OP}: oversample is {oversample}, wanted at least 0")
    if sweeps is not None and sweeps < 2:
        raise ValueError(
            f"{_OP}: sweeps is {sweeps}, wanted at least 2 (one pass finds a range, one more the "
            "factors)"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"{_OP}: seed is {seed}, wanted 0 to 2^63 - 1")


def check_not_meta(name: str, device: torch.device, op: str = _OP) -> None:
    """Fake tensors, those of torch.compile, say the device that they stand for."""
    if device.type == "meta":
        raise ValueError(f"{op}: {name} is on meta, where tensors have no numbers")


def check_integer(name: str, value: Any, op: str = _OP) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        return
    try:
        if isinstance(value, (bool, Tensor)):  # the value of a tensor may be far away
            raise TypeError
        operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}") from None


@torch.library.register_fake("structmat::randomized_svd")
def _(
    A: Tensor,
    rank: int,
    oversample: int | None,
    sweeps: int | None,
    seed: int,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    facts = A.new_empty((*A.shape[:-2], 6), dtype=torch.float64)
    return *_factors_like(A, rank), facts


@torch.library.register_fake("structmat::randomized_svd_to_tolerance")
def _(
    A: Tensor, rtol: float, oversample: int | None, sweeps: int | None, seed: int, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rank = torch.library.get_ctx().new_dynamic_size(min=1)
    return *_factors_like(A, rank), A.new_empty((6,), dtype=torch.float64)


@torch.library.register_fake("structmat::randomized_svd_list")
def _(
    A: list[Tensor],
    rank: list[int],
    oversample: int | None,
    sweeps: int | None,
    seed: int,
    center: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    U, S, Vh = zip(*map(_factors_like, A, rank), strict=True)
    facts = A[0].new_empty((len(A), 6), dtype=torch.float64)
    return list(U), list(S), list(Vh), facts


def _factors_like(A: Tensor, rank: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    *batch, m, n = A.shape
    return (
        A.new_empty((*batch, m, rank), dtype=dtype),
        A.new_empty((*batch, rank), dtype=dtype),
        A.new_empty((*batch, rank, n), dtype=dtype),
    )
