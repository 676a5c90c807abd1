# SPDX-License-Identifier: Apache-2.0
"""Products with A^T A."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .svd import _DTYPES


class GramMoments(NamedTuple):
    """What :func:`gram_matmul` returns with ``return_moments``: ``Z (..., n, l)``,
    ``column_sums (..., n)`` and ``norm (...)``.

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.ones(4, 2)
        >>> Z, column_sums, norm = sm.linalg.gram_matmul(A, torch.eye(2), return_moments=True)
        >>> column_sums.tolist(), round(float(norm), 6)
        ([4.0, 4.0], 2.828427)
    """

    Z: Tensor
    column_sums: Tensor
    norm: Tensor


@overload
def gram_matmul(A: Tensor, X: Tensor, *, return_moments: Literal[False] = False) -> Tensor: ...
@overload
def gram_matmul(A: Tensor, X: Tensor, *, return_moments: Literal[True]) -> GramMoments: ...
def gram_matmul(A: Tensor, X: Tensor, *, return_moments: bool = False) -> Tensor | GramMoments:
    """``A^T (A X)`` with one pass over ``A``: a step of power iteration, of least squares or of a
    Gauss-Newton product.

    Rows of ``A`` are taken in panels that stay in cache between the two products; ``A X`` is never
    stored as a whole. That pays where reading ``A`` is what costs: for narrow ``X``
    (`docs/linalg.md` has the measurements).

    Args:
        A: ``(..., m, n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device, any
            strides: a transpose or a slice is read where it lies. ``m n`` may exceed 2^31.
        X: ``(..., n, l)`` of A's dtype and device, with the same leading dimensions.
        return_moments: also return what the same read of ``A`` tells: the sums of its columns and
            its Frobenius norm.

    Returns:
        ``(..., n, l)`` of A's dtype. Any size may be zero. NaN and Inf propagate as in the two
        products.

        With ``return_moments`` :class:`GramMoments`: this, the column sums ``(..., n)``, added in
        float64, and ``||A||_F (...)``, float64, whose squares neither overflow nor vanish. The two
        have no gradient.

    Raises:
        TypeError: an argument is not a dense tensor, or the dtypes differ or are none of the four.
        ValueError: shapes or devices do not fit together.
        RuntimeError: ``return_moments`` under ``torch.func`` transforms or in forward mode.

    Sums, those of ``A X`` among them, are kept in float32 (float64 for float64) and rounded once;
    the gradient of a 16-bit ``A`` rounds ``A [X dZ]`` as well. The same inputs give the same bits
    for any number of threads. Both arguments have gradients, of any order: ``dX = A^T (A dZ)`` and
    ``dA = A (X dZ^T + dZ X^T)``. ``torch.func`` transforms and forward mode take two products of
    torch's.

    Cost: ``4 m n l`` FLOPs, one read of ``A``, of which 48 rows are packed at a time. Work space:
    ``n l`` numbers, ``l`` up to a multiple of 16, for each of at most 32 slabs of rows, together at
    most a quarter of ``A``. On CUDA a panel, 16 MB of ``A``, and 32 MB for cuBLAS; wide ``X`` reads
    ``A`` twice there, in two products, and ``return_moments`` once more.

    Source: the fused power step of Lu et al., Concurrency Comput. 32 (2020), doi 10.1002/cpe.5754,
    for caches instead of transfers to the device.

    Example:
        >>> import torch, structmat as sm
        >>> A, X = torch.randn(200, 30), torch.randn(30, 4)
        >>> torch.allclose(sm.linalg.gram_matmul(A, X), A.T @ (A @ X), atol=1e-2)
        True
    """
    _check(A, X)
    if return_moments:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            raise RuntimeError(
                "gram_matmul: return_moments has no rule for torch.func transforms and forward mode"
            )
        return GramMoments(*torch.ops.structmat.gram_matmul_moments.default(A, X))
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # The operator knows no tangents and no batches of batches; torch's products know all rules.
        wide = torch.promote_types(A.dtype, torch.float32)
        a = A.to(wide)
        with torch.autocast(A.device.type, enabled=False):
            return (a.mT @ (a @ X.to(wide))).to(A.dtype)
    return torch.ops.structmat.gram_matmul.default(A, X)


def _check(A: Any, X: Any) -> None:
    """Raises for arguments that do not fit together."""
    op = "gram_matmul"
    for name, tensor in (("A", A), ("X", X)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got layout {tensor.layout}")
        if tensor.dtype not in _DTYPES or tensor.dtype != A.dtype:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}, wanted "
                + ("one of " + ", ".join(map(str, _DTYPES)) if name == "A" else f"{A.dtype} as A")
            )
        if tensor.device != A.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, A on {A.device}")
        if tensor.dim() < 2:
            raise ValueError(f"{op}: {name} must have at least 2 dimensions, got {tensor.dim()}")
    if A.shape[:-2] != X.shape[:-2] or A.shape[-1] != X.shape[-2]:
        raise ValueError(
            f"{op}: A has shape {tuple(A.shape)}, X {tuple(X.shape)}, wanted "
            f"{(*A.shape[:-2], A.shape[-1], X.shape[-1])}"
        )


@torch.library.register_fake("structmat::gram_matmul")
def _(A: Tensor, X: Tensor) -> Tensor:
    _check(A, X)
    return X.new_empty(X.shape)


@torch.library.register_fake("structmat::gram_matmul_moments")
def _(A: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(A, X)
    sums = A.new_empty((*A.shape[:-2], A.shape[-1]), dtype=torch.float64)
    return X.new_empty(X.shape), sums, A.new_empty(A.shape[:-2], dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    if not isinstance(output, Tensor):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, dZ: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None]:
    if dZ is None:
        return None, None
    A, X = ctx.saved_tensors
    with torch.autocast(A.device.type, enabled=False):
        return _gradients(ctx, A, X, dZ)


def _gradients(ctx: Any, A: Tensor, X: Tensor, dZ: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dA = dX = None
    if ctx.needs_input_grad[0]:
        # A (X dZ^T + dZ X^T) without a matrix of n x n: two products of inner dimension 2 l.
        both = A @ torch.cat([X, dZ], dim=-1)
        dA = both @ torch.cat([dZ, X], dim=-1).mT
    if ctx.needs_input_grad[1]:
        dX = torch.ops.structmat.gram_matmul.default(A, dZ)
    return dA, dX


for _name in ("gram_matmul", "gram_matmul_moments"):
    torch.library.register_autograd(f"structmat::{_name}", _backward, setup_context=_setup_context)
