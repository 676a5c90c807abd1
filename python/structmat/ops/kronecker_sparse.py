# SPDX-License-Identifier: Apache-2.0
"""Products with chains of Kronecker-sparse factors, of support I_a (x) 1_{b x c} (x) I_d."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import monarch
from .arguments import (
    ACTIVATIONS,
    autocast,
    check_bias,
    check_dimensions,
    check_tensors,
    is_tracing,
    needs_composition,
    rows_of,
)
from .low_rank import low_rank_linear

_linear = torch.ops.structmat.kronecker_sparse_linear.default
_linear_backward = torch.ops.structmat.kronecker_sparse_linear_backward.default
_NONE = ACTIVATIONS["none"]


def kronecker_sparse_linear(
    x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """Applies a linear layer whose weight is a product of Kronecker-sparse matrices.

    A factor ``W (a, b, c, d)`` maps ``a c d`` columns to ``a b d``:

    ``z[t, (A b + B) d + D] = sum_C W[A,B,C,D] x[t, (A c + C) d + D]``

    so that it is zero but for ``I_a (x) 1_{b x c} (x) I_d``: ``d = 1`` is block-diagonal,
    ``a = d = 1`` dense. Chains of them are Monarch and butterfly matrices, block tensor trains,
    BLAST, low rank and Kronecker products; :mod:`structmat.kronecker_sparse` converts.

    Args:
        x: ``(..., n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        factors: tensors ``(a, b, c, d)`` of the dtype and device of ``x``, read through their
            strides; ``factors[0]`` is applied first. A list of one is allowed.
        bias: ``(m,)`` for the ``m`` outputs of the last factor, or ``None``.

    Returns:
        ``(..., m)``. Any size may be zero.

    Raises:
        TypeError: an argument is no dense tensor, or the dtypes differ or are not among the four.
        ValueError: there is no factor, or shapes or devices do not fit together.

    Two factors ``(K, Q, I, 1)`` and ``(1, L, S, J)`` that follow each other run as one product on
    the kernels of :func:`monarch_linear`, or of :func:`low_rank_linear` for ``K = J = 1``; what
    lies between other factors is stored, in the type of ``x``. Under ``torch.autocast`` the tensors
    are cast as those of ``torch.nn.functional.linear``. ``x``, all factors and the bias have
    gradients, of second order too; the inputs of the products and the factors are saved for them.
    ``torch.func`` transforms, forward-mode differentiation, ``torch.export`` and
    ``torch.jit.trace`` take torch's own products. The same inputs give the same bits for any number
    of threads.

    Cost: ``2 T a b c d`` FLOPs for each factor, three times that with all gradients. Sums are kept
    in float32 (float64 for float64).

    The factors are those of Gonon, Zheng, Carrivain and Le, Fast inference with Kronecker-sparse
    matrices, 2024.

    Example:
        >>> import torch, structmat as sm
        >>> x, A, B = torch.randn(5, 6), torch.randn(2, 4, 3, 1), torch.randn(1, 5, 2, 4)
        >>> y = sm.ops.kronecker_sparse_linear(x, [A, B])
        >>> W = sm.kronecker_sparse.to_dense([A, B])
        >>> W.shape, torch.allclose(y, x @ W.T, rtol=1e-4, atol=1e-4)
        (torch.Size([20, 6]), True)
    """
    try:
        if isinstance(factors, Tensor):
            _check(x, factors, bias)
        factors = list(factors)
        if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
            x, bias, *factors = autocast(x, bias, *factors)
        composes = needs_composition()
        if not factors or (composes and not is_tracing()):
            _check(x, factors, bias)
        y, rest = x, list(factors)
        while rest:
            first = rest.pop(0)
            pair = not composes and rest and _is_monarch(first, rest[0])
            second = rest.pop(0) if pair else None
            last = None if rest else bias
            if second is None:
                y = product(y, first, last, _NONE)
            else:
                y = _monarch(y, first, second, last)
        return y
    except (RuntimeError, AttributeError, TypeError, ValueError):
        _check(x, factors, bias)  # says what was wrong, where it was the arguments
        raise


def _is_monarch(first: Tensor, second: Tensor) -> bool:
    """Whether two factors are (K, Q, I, 1) and (1, L, S, J) with K Q = J S."""
    if first.dim() != 4 or second.dim() != 4:
        return False
    (K, Q, _, d), (a, _, S, J) = first.shape, second.shape
    return a == 1 and d == 1 and K * Q == J * S and K > 0 and J > 0


def _monarch(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    if first.shape[0] == 1 and second.shape[3] == 1:  # for one token a fifth of the time
        return low_rank_linear(x, second[0, :, :, 0], first[0, :, :, 0], bias)
    W1 = first.squeeze(3).unsqueeze(1)  # (K, 1, Q, I)
    W2 = second.squeeze(0).permute(2, 0, 1).unsqueeze(2)  # (J, L, 1, S)
    return monarch.product(x, W1, W2, bias, _NONE, True, True)


def product(x: Tensor, W: Tensor, bias: Tensor | None, activation: tuple[int, Any]) -> Tensor:
    """The product with one factor, unchecked."""
    code, function = activation
    if needs_composition():
        y = _composed(x, W)
        return function(y if bias is None else y + bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or W.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return function(_KroneckerSparseLinear.apply(x, W, bias))
    return _linear(x, W, bias, code)


def _check(x: Any, factors: Any, bias: Any) -> None:
    """Raises for arguments that do not fit together."""
    op = "kronecker_sparse_linear"
    if isinstance(factors, Tensor) or not isinstance(factors, Sequence):
        raise TypeError(f"{op}: factors must be a list of tensors, got {type(factors).__name__}")
    if not factors:
        raise ValueError(f"{op}: factors is empty, wanted at least one")
    named = {f"factors[{i}]": factor for i, factor in enumerate(factors)}
    check_tensors(op, {"x": x} | named | ({} if bias is None else {"bias": bias}))
    width, source = x.shape[-1], "x has"
    for name, factor in named.items():
        check_dimensions(op, name, factor, 4)
        a, b, c, d = factor.shape
        if width != a * c * d:
            raise ValueError(
                f"{op}: {source} {width} columns, {name} {tuple(factor.shape)} takes "
                f"a c d = {a * c * d}"
            )
        width, source = a * b * d, f"{name} {tuple(factor.shape)} gives"
    check_bias(op, bias, width)


def _outputs(W: Tensor) -> int:
    return W.shape[0] * W.shape[1] * W.shape[3]


def _inputs(W: Tensor) -> int:
    return W.shape[0] * W.shape[2] * W.shape[3]


@torch.library.register_fake("structmat::kronecker_sparse_linear")
def _(x: Tensor, W: Tensor, bias: Tensor | None = None, activation: int = 0) -> Tensor:
    _check(x, [W], bias)
    return x.new_empty((*x.shape[:-1], _outputs(W)))


@torch.library.register_fake("structmat::kronecker_sparse_linear_backward")
def _(
    dy: Tensor, x: Tensor | None, W: Tensor, need_x: bool, need_W: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], _inputs(W)) if need_x else (0,)),
        W.new_empty(W.shape if need_W else (0,)),
        dy.new_empty((_outputs(W) if need_bias else 0,)),
    )


class _KroneckerSparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        need_x, need_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_W else None, W if need_x or need_W else None)
        return _linear(x, W, bias, 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or W is None:
            return _differentiable_backward(dy, x, W, needs)
        found = _linear_backward(dy, x, W, *needs)
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))


# The same in torch's operations, which have derivatives of every kind.


def _composed(x: Tensor, W: Tensor) -> Tensor:
    a, _, c, d = W.shape
    return torch.einsum("...acd,abcd->...abd", x.unflatten(-1, (a, c, d)), W).flatten(-3)


def _differentiable_backward(
    dy: Tensor, x: Tensor | None, W: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    need_x, need_W, need_bias = needs
    dx = dW = None
    rows = rows_of(dy)
    dbias = rows.sum(0) if need_bias else None
    if W is None:
        return dx, dW, dbias
    a, b, c, d = W.shape
    rows = rows.unflatten(1, (a, b, d))
    if need_x:
        dx = torch.einsum("tabd,abcd->tacd", rows, W).reshape(*dy.shape[:-1], a * c * d)
    if need_W and x is not None:
        blocks = rows_of(x).unflatten(1, (a, c, d))
        dW = torch.einsum("tabd,tacd->abcd", rows, blocks)
    return dx, dW, dbias
