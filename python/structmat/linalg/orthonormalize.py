# SPDX-License-Identifier: Apache-2.0
"""Orthonormal bases of tall matrices."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .svd import _DTYPES, check_integer, check_not_meta


@overload
def orthonormalize(Y: Tensor, *, seed: int = 0, return_rank: Literal[False] = False) -> Tensor: ...
@overload
def orthonormalize(
    Y: Tensor, *, seed: int = 0, return_rank: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def orthonormalize(
    Y: Tensor, *, seed: int = 0, return_rank: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of the columns of a tall matrix, whatever these are.

    ``Q^T Q = I`` to rounding and ``Y = Q (Q^T Y)``: the ``Q`` of ``Y = Q R`` with a positive
    diagonal of ``R``, up to signs that of ``torch.linalg.qr``. Each pass forms ``Y^T Y`` of scaled
    columns in float64, factors it and applies ``R^-1`` by substitution, in float64 too. One pass is
    enough up to a condition of about 8,000 in float32, two where it is less extreme than
    ``1 / eps``; columns nearer to the span of their predecessors wait for the next pass, where
    their own norm scales them.

    A column that adds nothing to those before it, because it is zero or equal to a combination of
    them, is replaced by a random direction orthogonal to all others, from the counter generator
    (:func:`gaussian`): ``Q`` always has ``l`` orthonormal columns.

    Args:
        Y: ``(..., m, l)`` with ``m >= l``, float32, float64, bfloat16 or float16, on the CPU or a
            CUDA device, any strides. Entries may have any finite magnitude, subnormal ones too.
        seed: of the random directions, 0 to 2^63 - 1. The same inputs give the same bits for any
            number of threads.
        return_rank: also return the numerical rank.

    Returns:
        ``Q (..., m, l)`` of Y's dtype, float32 for 16-bit ``Y``; ``max |Q^T Q - I|`` is at most
        1e-5 in float32 and 1e-13 in float64.

        With ``return_rank`` a pair of this and the rank, int64 of shape ``(...)``: how many columns
        keep more than ``16 eps`` of their norm outside the span of their predecessors, ``eps`` of
        Q's dtype.

    Raises:
        TypeError: ``Y`` is not a dense tensor of one of the four dtypes.
        ValueError: ``Y`` has fewer than 2 dimensions or more columns than rows; the seed is out of
            range.
        torch.linalg.LinAlgError: ``Y`` contains NaN or Inf. To know it, the GPU is waited for. In
            a compiled or captured graph there is no exception: the result is NaN.
        RuntimeError: under ``torch.func`` transforms or in forward mode, for which there is no
            rule.

    The gradient is that of the QR factorisation, of second order too; it exists where ``Y`` has
    full rank, and is not finite elsewhere. The rank has none.

    Cost: ``2 m l^2`` FLOPs a pass and two reads of ``Y`` on the CPU, in tiles that lie in cache.
    On CUDA six passes are enqueued, of which those not needed stand down on the device, and
    ``m l`` numbers of float64 are work space.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44 (2015) (CholeskyQR2); Fukaya et al.,
    SIAM J. Sci. Comput. 42 (2020).

    Example:
        >>> import torch, structmat as sm
        >>> Y = torch.randn(100, 3)
        >>> Q, rank = sm.linalg.orthonormalize(torch.cat([Y, Y], dim=1), return_rank=True)
        >>> torch.allclose(Q.T @ Q, torch.eye(6), atol=1e-5), int(rank)
        (True, 3)
    """
    op = "orthonormalize"
    if not isinstance(Y, Tensor):
        raise TypeError(f"{op}: Y must be a tensor, got {type(Y).__name__}")
    if Y.layout != torch.strided:
        raise TypeError(f"{op}: Y must be dense, got layout {Y.layout}")
    if Y.dtype not in _DTYPES:
        raise TypeError(f"{op}: Y is {Y.dtype}, wanted one of " + ", ".join(map(str, _DTYPES)))
    if Y.dim() < 2:
        raise ValueError(f"{op}: Y must have at least 2 dimensions, got {Y.dim()}")
    if Y.shape[-2] < Y.shape[-1]:
        raise ValueError(
            f"{op}: Y has shape {tuple(Y.shape)}, wanted at least as many rows as columns"
        )
    check_integer("seed", seed, op)
    check_not_meta("Y", Y.device, op)
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(f"{op}: there is no rule for torch.func transforms and forward mode")
    Q, residual = torch.ops.structmat.orthonormalize.default(Y, seed)
    in_graph = torch.compiler.is_compiling() or (
        Y.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    if not in_graph and bool(residual.isnan().any()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{op}: Y contains NaN or Inf"
        )
    if not return_rank:
        return Q
    return Q, (residual > 16 * torch.finfo(Q.dtype).eps).sum(-1)


@torch.library.register_fake("structmat::orthonormalize")
def _(Y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if Y.dtype == torch.float64 else torch.float32
    return (
        Y.new_empty(Y.shape, dtype=dtype),
        Y.new_empty((*Y.shape[:-2], Y.shape[-1]), dtype=torch.float64),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dQ: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    """Walter, Lehmann, Lamour, Optim. Methods Softw. 27 (2012), for R without a gradient."""
    if dQ is None:
        return None, None
    Y, Q = ctx.saved_tensors
    with torch.autocast(Q.device.type, enabled=False):
        R = (Q.mT @ Y.to(Q.dtype)).triu()
        M = -(dQ.mT @ Q)
        symmetric = M.tril() + M.tril(-1).mT
        dY = torch.linalg.solve_triangular(R.mT, dQ + Q @ symmetric, upper=False, left=False)
    return dY.to(Y.dtype), None


torch.library.register_autograd(
    "structmat::orthonormalize", _backward, setup_context=_setup_context
)
