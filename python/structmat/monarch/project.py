# SPDX-License-Identifier: Apache-2.0
"""The Monarch matrix nearest to a dense one."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linalg.svd import check_integer, check_not_meta
from .truncate import Truncated, truncate, truncate_full, truncate_weighted

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Factors(NamedTuple):
    W1: Tensor
    W2: Tensor


class MonarchProjection(_Factors):
    """The pair ``W1``, ``W2`` with the facts of the projection it came from.

    Attributes:
        error: ``||W - M||_F / ||W||_F`` of the Monarch matrix ``M``, from what the SVDs left out;
            with second moments C of the inputs, ``||(W - M) C^(1/2)||_F / ||W C^(1/2)||_F``. Of
            the factors before they were rounded to the dtype of W, which adds about its eps.
        ranks: ``(K, J)``, the rank each block was given. Under a budget with second moments, full
            ones too, by the singular values of the block weighted by its own inputs alone.

    ``_replace`` carries both over as they are.

    Example:
        >>> import torch, structmat as sm
        >>> found = sm.monarch.project(torch.eye(16), 4, 4, 1)
        >>> W1, W2 = found
        >>> found.W1 is W1, round(found.error, 3)
        (True, 0.866)
    """

    error: float
    ranks: Tensor

    def _replace(self, **factors: Any) -> "MonarchProjection":
        return _result(*super()._replace(**factors), self)


def project(
    W: Tensor,
    K: int,
    J: int,
    R: int | None = None,
    *,
    ranks: str | None = None,
    inputs: Tensor | None = None,
) -> MonarchProjection:
    """Approximates a dense matrix by the nearest Monarch matrix.

    ``W (m, n)`` is cut into ``J x K`` blocks of ``L x I``, ``m = J L``, ``n = K I``. Block
    ``(j, k)`` of a Monarch matrix, ``sum_r W2[j, :, k, r] W1[k, j, r, :]``, is any matrix of rank R
    at most, whatever the others are. Hence the truncated SVDs of the blocks are the optimum, in the
    Frobenius norm over all of W, and for each block in every unitarily invariant norm
    (Eckart, Young 1936). Singular values are split evenly: both factors carry their roots.

    Args:
        W: ``(m, n)``, float32, float64, bfloat16 or float16, of any strides, on the CPU or a CUDA
            device. No gradient is recorded.
        K: number of input blocks, a divisor of n.
        J: number of output blocks, a divisor of m.
        R: rank of each block, 1 to ``min(L, I)``. By default that of the published layer, whose
            hidden units are about as many as ``min(m, n)``: ``min(m, n) / (K J)``, at least 1.
        ranks: ``"budget"`` lets ranks differ: of all singular values of all blocks the ``K J R``
            largest are kept, which is optimal for that number of hidden units. Factors have the
            largest rank for R then, with zeros where a block's own is less. With inputs the values
            are those of ``W_jk C_kk^(1/2)``, also for full moments, whose sweeps keep the ranks.
        inputs: second moments of the layer's inputs, ``E[x x^T]`` or their sum: minimises the
            expected ``||(W - M) x||^2`` instead. Of shape ``(K, I, I)``, the diagonal blocks
            alone: closed form, the truncated SVD of ``W_jk C_kk^(1/2)``. Of shape ``(n, n)``:
            starts there and then solves for one input block after the other; the error never grows
            in a sweep over them, and the sweeps end when one takes less than 0.5 % of the squared
            error, after at most 50. That is near a stationary point, not always the global optimum.
            C may be singular: rank of a block that no input has a use for then goes to what is left
            of the weight itself.

    Returns:
        ``W1 (K, J, R, I)`` and ``W2 (J, L, K, R)`` for :func:`structmat.ops.monarch_linear`, of the
        dtype and device of W, with ``.error`` and ``.ranks``.

    Raises:
        TypeError: W or inputs is no dense tensor of one of these dtypes; K, J or R no integer.
        ValueError: W is not 2-D or has no entries; K does not divide n, or J m; R, ranks or the
            shape or device of inputs is none of the above; inputs is not symmetric, or has negative
            eigenvalues.
        torch.linalg.LinAlgError: NaN or Inf in W or in inputs.

    Cost: with b the shorter and c the longer side of a block, ``K J (c b^2 + 4/3 b^3)`` FLOPs in
    float64 for small R, up to ``K J (c b^2 + 9 b^3)`` for R near b, and one read of W through its
    strides. Full moments: ``2 m n^2`` FLOPs a sweep,
    in float64.

    Source: Dao et al., Monarch (ICML 2022), section 3.3, for square W and R = 1.

    Example:
        >>> import torch, structmat as sm
        >>> W1, W2 = torch.randn(4, 2, 3, 8), torch.randn(2, 5, 4, 3)
        >>> W = torch.einsum("jlkr,kjri->jlki", W2, W1).reshape(10, 32)
        >>> found = sm.monarch.project(W, 4, 2, 3)
        >>> found.error < 1e-6, tuple(found.W1.shape), tuple(found.W2.shape)
        (True, (4, 2, 3, 8), (2, 5, 4, 3))
    """
    op = "monarch.project"
    m, n = _check_matrix(W, op)
    _check_divisor("K", K, n, "columns", op)
    _check_divisor("J", J, m, "rows", op)
    L, I = m // J, n // K
    if R is None:
        R = min(L, I, max(1, min(m, n) // (K * J)))
    check_integer("R", R, op)
    if not 1 <= R <= min(L, I):
        raise ValueError(f"{op}: R is {R}, wanted 1 to {min(L, I)} for blocks of ({L}, {I})")
    if ranks not in (None, "budget"):
        raise ValueError(f"{op}: ranks is {ranks!r}, wanted 'budget' or None")
    blocks = W.detach().unflatten(1, (K, I)).unflatten(0, (J, L)).permute(2, 0, 1, 3)
    budget = K * J * R if ranks == "budget" else None
    found = _truncate(blocks, R, budget, inputs, op)
    W1, W2 = found.V.to(W.dtype), found.U.permute(1, 2, 0, 3).to(W.dtype).contiguous()
    return _result(W1, W2, found)


def project_blockdiag_butterfly(
    W: Tensor, k: int, q: int, l: int, *, inputs: Tensor | None = None
) -> MonarchProjection:
    """Approximates a dense matrix by the nearest one of the published Monarch layout.

    ``y = blockdiag(w2) P blockdiag(w1) x`` with ``w1 (k, q, p)`` and ``w2 (l, s, r)``, ``n = k p``,
    ``m = l s`` and ``k q = l r`` hidden units. Hidden unit h belongs to input block ``h // q`` and
    to output block ``h mod l``, whose output ``i`` is row ``i l + h mod l``. The block of W that
    input and output block share has the rank of the hidden units they share, ``floor(q / l)`` or
    ``ceil(q / l)``, which may be zero. Each is its truncated SVD, for any k, q and l.

    Args:
        W: ``(m, n)``, as for :func:`project`.
        k: number of input blocks, a divisor of n.
        q: hidden units of an input block.
        l: number of output blocks, a divisor of m and of ``k q``.
        inputs: as for :func:`project`, with ``k`` blocks.

    Returns:
        ``w1 (k, q, p)`` and ``w2 (l, s, r)``, for
        :func:`structmat.monarch.from_blockdiag_butterfly`, with ``.error`` and ``.ranks (k, l)``.

    Raises:
        TypeError: as :func:`project`.
        ValueError: as :func:`project`, or l does not divide ``k q``.
        torch.linalg.LinAlgError: NaN or Inf in W or in inputs.

    Cost: that of :func:`project` with ``K = k``, ``J = l`` and ``R = ceil(q / l)``.

    Source: the layout is that of Dao et al. (ICML 2022); the projection of theirs is for square
    matrices of blocks of rank one.

    Example:
        >>> import torch, structmat as sm
        >>> w1, w2 = sm.monarch.project_blockdiag_butterfly(torch.randn(15, 12), 4, 5, 5)
        >>> tuple(w1.shape), tuple(w2.shape)
        ((4, 5, 3), (5, 3, 4))
    """
    op = "monarch.project_blockdiag_butterfly"
    m, n = _check_matrix(W, op)
    _check_divisor("k", k, n, "columns", op)
    _check_divisor("l", l, m, "rows", op)
    check_integer("q", q, op)
    if q < 1 or k * q % l:
        raise ValueError(
            f"{op}: q is {q}, wanted a positive number with k q = {k} q divisible by {l}"
        )
    p, s, r = n // k, m // l, k * q // l
    hidden = torch.arange(k * q, device=W.device)
    source, target = hidden // q, hidden % l
    first = source * q + (target - source * q) % l  # the first unit these two blocks share
    place = (hidden - first) // l
    ranks = torch.zeros(k, l, dtype=torch.long, device=W.device)
    ranks.index_put_((source, target), torch.ones_like(hidden), accumulate=True)
    blocks = W.detach().unflatten(1, (k, p)).unflatten(0, (s, l)).permute(2, 1, 0, 3)
    found = _truncate(blocks, ranks, None, inputs, op)
    there = place < found.U.shape[-1]  # else beyond the rank of any block of this size
    source, target, place, hidden = (t[there] for t in (source, target, place, hidden))
    w1 = found.V.new_zeros(k * q, p)
    w1[hidden] = found.V[source, target, place]
    w2 = found.U.new_zeros(l, r, s)
    w2[target, hidden // l] = found.U[source, target, :, place]
    return _result(w1.view(k, q, p).to(W.dtype), w2.mT.to(W.dtype).contiguous(), found)


def _result(W1: Tensor, W2: Tensor, found: Truncated | MonarchProjection) -> MonarchProjection:
    result = MonarchProjection(W1, W2)
    result.error, result.ranks = found.error, found.ranks
    return result


def _truncate(
    blocks: Tensor, ranks: Tensor | int, budget: int | None, inputs: Tensor | None, op: str
) -> Truncated:
    if inputs is None:
        return truncate(blocks, ranks, budget, op)
    K, I = blocks.shape[0], blocks.shape[3]
    moments = _check_moments(inputs, K, I, blocks.device, op)
    if moments.dim() == 3:
        return truncate_weighted(blocks, ranks, budget, moments, op)
    return truncate_full(blocks, ranks, budget, moments, op)


def _check_matrix(W: Any, op: str) -> tuple[int, int]:
    _check_tensor("W", W, op)
    if W.dim() != 2 or not W.numel():
        raise ValueError(f"{op}: W has shape {tuple(W.shape)}, wanted (m, n) with m, n > 0")
    m, n = W.shape
    return m, n


def _check_tensor(name: str, tensor: Any, op: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got layout {tensor.layout}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} is {tensor.dtype}, wanted one of " + ", ".join(map(str, _DTYPES))
        )
    check_not_meta(name, tensor.device, op)


def _check_divisor(name: str, count: Any, size: int, what: str, op: str) -> None:
    check_integer(name, count, op)
    if count < 1 or size % count:
        raise ValueError(
            f"{op}: {name} is {count}, wanted a divisor of {size}, the number of {what} of W"
        )


def _check_moments(inputs: Any, K: int, I: int, device: torch.device, op: str) -> Tensor:
    _check_tensor("inputs", inputs, op)
    if tuple(inputs.shape) not in ((K, I, I), (K * I, K * I)):
        raise ValueError(
            f"{op}: inputs has shape {tuple(inputs.shape)}, wanted {(K * I, K * I)}, or "
            f"{(K, I, I)} for the diagonal blocks alone"
        )
    if inputs.device != device:
        raise ValueError(f"{op}: inputs is on {inputs.device}, W on {device}")
    C = inputs.detach().double()
    largest = float(C.abs().max())
    if not math.isfinite(largest):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{op}: inputs contains NaN or Inf"
        )
    C = C / (largest or 1.0)  # scales change nothing, but may overflow
    rounding = 8 * torch.finfo(inputs.dtype).eps
    if bool(((C - C.mT).abs() > rounding).any()):
        raise ValueError(f"{op}: inputs is not symmetric, wanted second moments E[x x^T]")
    return (C + C.mT) / 2
