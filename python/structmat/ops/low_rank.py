# SPDX-License-Identifier: Apache-2.0
"""Products with a weight of low rank, W = U V."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .arguments import (
    autocast,
    check_bias,
    check_dimensions,
    check_tensors,
    is_tracing,
    needs_composition,
    rows_of,
)

_linear = torch.ops.structmat.low_rank_linear.default
_linear_train = torch.ops.structmat.low_rank_linear_train.default
_linear_backward = torch.ops.structmat.low_rank_linear_backward.default


def low_rank_linear(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    """Applies a linear layer whose weight is the product of two thin factors.

    ``y = x V^T U^T + bias``, computed as ``h = x V^T``, ``y = h U^T + bias``: the weight
    ``W = U V`` is never formed.

    Args:
        x: ``(..., n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        U: ``(m, r)``, of the dtype and device of ``x``, like the other two.
        V: ``(r, n)``.
        bias: ``(m,)`` or ``None``.

    Returns:
        ``(..., m)``. Any size may be zero; with ``r = 0`` the result is the bias.

    Raises:
        TypeError: an argument is no dense tensor, or the dtypes differ or are not among the four.
        ValueError: shapes or devices do not fit together.

    Under ``torch.autocast`` the arguments are cast as those of ``torch.nn.functional.linear``.
    All four arguments have gradients, of second order too. Saved for the backward pass: ``x`` if
    ``V`` needs a gradient, ``h`` (``T r`` numbers for ``T`` rows of ``x``) if ``U`` needs one, and
    the factors that the gradients asked for are made of. ``torch.func`` transforms, forward-mode
    differentiation, ``torch.export`` and ``torch.jit.trace`` take two products of torch's.

    Cost: ``2 T r (m + n)`` FLOPs forward and ``4 T r (m + n)`` for all gradients, against
    ``2 T m n`` and ``4 T m n`` of the dense layer; it is the smaller for ``r < m n / (m + n)``.
    Sums are kept in float32 (float64 for float64). Between the two products of 16-bit tensors ``h``
    is float32 for up to 4 rows, and for more on CPUs unless they multiply bfloat16 by AMX, and for
    up to 16 rows on CUDA; otherwise it is rounded to their type, in which a float16 ``h`` above
    65,504 is infinite. The same inputs give the same bits for
    any number of threads.

    Example:
        >>> import torch, structmat as sm
        >>> x, U, V = torch.randn(5, 64), torch.randn(32, 4), torch.randn(4, 64)
        >>> y = sm.ops.low_rank_linear(x, U, V)
        >>> torch.allclose(y, x @ (U @ V).T, rtol=1e-4, atol=1e-4)
        True
    """
    try:
        if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
            x, U, V, bias = autocast(x, U, V, bias)
        if needs_composition():
            if not is_tracing():  # where sizes are no numbers
                _check(x, U, V, bias)
            return functional.linear(functional.linear(x, V), U, bias)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or U.requires_grad
            or V.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            y, _ = _LowRankLinear.apply(x, U, V, bias, U.requires_grad)
            return y
        return _linear(x, U, V, bias)
    except (RuntimeError, AttributeError):
        _check(x, U, V, bias)  # says what was wrong, where it was the arguments
        raise


def _check(x: Any, U: Any, V: Any, bias: Any) -> None:
    """Raises for arguments that do not fit together."""
    op = "low_rank_linear"
    check_tensors(op, {"x": x, "U": U, "V": V} | ({} if bias is None else {"bias": bias}))
    check_dimensions(op, "U", U, 2)
    check_dimensions(op, "V", V, 2)
    if V.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} columns, V {tuple(V.shape)} takes {V.shape[1]}"
        )
    if U.shape[1] != V.shape[0]:
        raise ValueError(
            f"{op}: U {tuple(U.shape)} has rank {U.shape[1]}, V {tuple(V.shape)} {V.shape[0]}"
        )
    check_bias(op, bias, U.shape[0])


@torch.library.register_fake("structmat::low_rank_linear")
def _(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, U, V, bias)
    return x.new_empty((*x.shape[:-1], U.shape[0]))


@torch.library.register_fake("structmat::low_rank_linear_train")
def _(
    x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    _check(x, U, V, bias)
    y = x.new_empty((*x.shape[:-1], U.shape[0]))
    return y, x.new_empty((*x.shape[:-1], U.shape[1]) if keep_hidden else (0,))


@torch.library.register_fake("structmat::low_rank_linear_backward")
def _(
    dy: Tensor,
    x: Tensor | None,
    U: Tensor,
    V: Tensor,
    hidden: Tensor | None,
    need_x: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], V.shape[1]) if need_x else (0,)),
        U.new_empty((0,) if hidden is None else U.shape),
        V.new_empty((0,) if x is None else V.shape),
        dy.new_empty(U.shape[:1] if need_bias else (0,)),
    )


class _LowRankLinear(torch.autograd.Function):
    # torch.library.register_autograd costs 10 us more a step, and 3 us where there is nothing to
    # record, as much as the product of a single row; a setup_context of its own 15 us.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, keep_hidden: bool
    ) -> tuple[Tensor, Tensor]:
        y, hidden = _linear_train(x, U, V, bias, keep_hidden)
        need_x, _, need_V, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_V else None,
            U if need_x or need_V else None,
            V if need_x or need_V else None,
            hidden if keep_hidden else None,
        )
        ctx.set_materialize_grads(False)
        return y, hidden

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, U, V, hidden = ctx.saved_tensors
        need_x, need_U, need_V, need_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or dh is not None or dy is None or U is None:
            return *_differentiable_backward(dy, dh, x, U, V, hidden, ctx.needs_input_grad), None
        dx, dU, dV, db = _linear_backward(
            dy, x if need_V else None, U, V, hidden if need_U else None, need_x, need_bias
        )
        return (
            dx if need_x else None,
            dU if need_U else None,
            dV if need_V else None,
            db if need_bias else None,
            None,
        )


def _differentiable_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    hidden: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same gradients in operations that have gradients themselves.

    The saved `hidden` is an output of the node, hence of x and V: a second derivative through it
    comes back as `dh`.
    """
    need_x, need_U, need_V, need_bias, _ = needs
    dU = dbias = None
    if dy is not None:
        if need_U and hidden is not None:
            dU = rows_of(dy).T @ rows_of(hidden)
        if need_bias:
            dbias = rows_of(dy).sum(0)
        if U is not None:
            dh = dy @ U if dh is None else dy @ U + dh
    dx = dh @ V if dh is not None and V is not None and need_x else None
    dV = rows_of(dh).T @ rows_of(x) if dh is not None and x is not None and need_V else None
    return dx, dU, dV, dbias
