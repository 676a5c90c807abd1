# SPDX-License-Identifier: Apache-2.0
"""The operators behind ``sparse_low_rank.py``: calls, fakes and gradients, of any order."""

from typing import Any

import torch
from torch import Tensor

from ..sparse_pattern import SparsePattern
from .arguments import rows_of

_linear = torch.ops.structmat.sparse_low_rank_linear.default
_linear_backward = torch.ops.structmat.sparse_low_rank_linear_backward.default
_sampled = torch.ops.structmat.sampled_matmul.default


def linear(
    x: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    """``x (base + U V + S)^T + bias``, a node of the graph where one is wanted."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or values.requires_grad
        or (U is not None and U.requires_grad)
        or (V is not None and V.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        if x.requires_grad:
            pattern.transpose()
        keep = U is not None and U.requires_grad
        y, _ = _SparseLowRankLinear.apply(x, U, V, values, bias, base, pattern, keep)
        return y
    return _call(x, U, V, pattern, values, bias, base, False)[0]


def sampled(dy: Tensor, x: Tensor, pattern: SparsePattern) -> Tensor:
    """``dy^T x`` on the support, likewise."""
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        if x.requires_grad:
            pattern.transpose()
        found: Tensor = _SampledMatmul.apply(dy, x, pattern)
        return found
    return _call_sampled(dy, x, pattern)


def _call(
    x: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _linear(
        x, U, V, pattern.starts, pattern.columns, *pattern.shape, pattern.group, values, bias,
        base, keep_hidden,
    )  # fmt: skip
    return found


def _call_backward(
    dy: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    pattern: SparsePattern,
    values: Tensor,
    base: Tensor | None,
    hidden: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, ...]:
    """``dx, dU, dV, dvalues, dbias``; ``wanted`` tells which of them but dU, wanted with hidden."""
    transposed: tuple[Any, ...] = (None, None, None, 1)
    if wanted[0]:
        other, permutation = pattern.transpose()
        # Rows in a row with the same columns.
        strip = pattern.group if pattern.family == "block16" else 1
        transposed = other.starts, other.columns, permutation, strip
    found: tuple[Tensor, ...] = _linear_backward(
        dy, x, U, V, pattern.starts, pattern.columns, *pattern.shape, pattern.group, values, base,
        *transposed, hidden, *wanted,
    )  # fmt: skip
    return found


def _call_sampled(dy: Tensor, x: Tensor, pattern: SparsePattern) -> Tensor:
    found: Tensor = _sampled(
        dy, x, pattern.starts, pattern.columns, *pattern.shape, pattern.group, pattern.nnz
    )
    return found


def _check_devices(op: str, *tensors: Tensor | None) -> None:
    """For the fakes, which are called as soon as one of the tensors is on the meta device."""
    if len({a.device for a in tensors if a is not None}) > 1:
        raise RuntimeError(f"{op}: the tensors are on different devices")


@torch.library.register_fake("structmat::sparse_low_rank_linear")
def _(
    x: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    starts: Tensor,
    columns: Tensor,
    rows: int,
    cols: int,
    group: int,
    values: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices("sparse_low_rank_linear", x, U, V, starts, columns, values, bias, base)
    hidden = (0,) if U is None or not keep_hidden else (*x.shape[:-1], U.shape[1])
    return x.new_empty((*x.shape[:-1], rows)), x.new_empty(hidden)


@torch.library.register_fake("structmat::sparse_low_rank_linear_backward")
def _(
    dy: Tensor,
    x: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    starts: Tensor,
    columns: Tensor,
    rows: int,
    cols: int,
    group: int,
    values: Tensor,
    base: Tensor | None,
    transposed_starts: Tensor | None,
    transposed_columns: Tensor | None,
    permutation: Tensor | None,
    strip: int,
    hidden: Tensor | None,
    need_x: bool,
    need_V: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    index = starts, columns, transposed_starts, transposed_columns, permutation
    _check_devices("sparse_low_rank_linear_backward", dy, x, U, V, *index, values, base, hidden)
    return (
        dy.new_empty((*dy.shape[:-1], cols) if need_x else (0,)),
        dy.new_empty((0,) if hidden is None or U is None else U.shape),
        dy.new_empty(V.shape if need_V and V is not None else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
        dy.new_empty((dy.shape[-1] if need_bias else 0,)),
    )


@torch.library.register_fake("structmat::sampled_matmul")
def _(
    dy: Tensor,
    x: Tensor,
    starts: Tensor,
    columns: Tensor,
    rows: int,
    cols: int,
    group: int,
    nnz: int,
) -> Tensor:
    _check_devices("sampled_matmul", dy, x, starts, columns)
    return dy.new_empty((nnz,))


class _SparseLowRankLinear(torch.autograd.Function):
    # As in low_rank.py: cheaper by 10 us a step than torch.library.register_autograd.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        U: Tensor | None,
        V: Tensor | None,
        values: Tensor,
        bias: Tensor | None,
        base: Tensor | None,
        pattern: SparsePattern,
        keep_hidden: bool,
    ) -> tuple[Tensor, Tensor]:
        y, hidden = _call(x, U, V, pattern, values, bias, base, keep_hidden)
        need_x, _, need_V, need_values, *_ = ctx.needs_input_grad
        weights = need_x or need_V
        ctx.save_for_backward(
            x if need_V or need_values else None,
            U if weights else None,
            V if weights else None,
            values if weights else None,
            base if need_x else None,
            hidden if keep_hidden else None,
        )
        ctx.pattern = pattern
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():  # where there are no second derivatives
            ctx.mark_non_differentiable(hidden)
        return y, hidden

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, U, V, values, base, hidden = ctx.saved_tensors
        pattern = ctx.pattern
        needs = ctx.needs_input_grad[:5]
        need_x, _, need_V, need_values, need_bias = needs
        compiling = torch.compiler.is_compiling()
        anew = not compiling and (torch.is_grad_enabled() or dh is not None)
        if anew or values is None or dy is None:
            found = _differentiable_backward(dy, dh, x, U, V, values, base, hidden, pattern, needs)
        else:
            wanted = need_x, need_V, need_values, need_bias
            found = _call_backward(dy, x, U, V, pattern, values, base, hidden, wanted)
        grads = (g if need else None for g, need in zip(found, needs, strict=True))
        return *grads, None, None, None


def _differentiable_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    values: Tensor | None,
    base: Tensor | None,
    hidden: Tensor | None,
    pattern: SparsePattern,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same gradients in operations that have gradients themselves, none of them m x n.

    The saved `hidden` is an output of the node, hence of x and V: a second derivative through it
    comes back as `dh`.
    """
    need_x, need_U, need_V, need_values, need_bias = needs
    dx = dU = dV = dvalues = dbias = None
    if dy is not None:
        if need_U and hidden is not None:
            dU = rows_of(dy).T @ rows_of(hidden)
        if need_values and x is not None:
            dvalues = (_call_sampled if torch.compiler.is_compiling() else sampled)(dy, x, pattern)
        if need_bias:
            dbias = rows_of(dy).sum(0)
        if need_x:
            dx = _InputGradient.apply(dy, U, V, values, base, pattern)
    if dh is not None and V is not None and need_x:
        dx = dh @ V if dx is None else dx + dh @ V
    if dy is not None and U is not None:
        dh = dy @ U if dh is None else dy @ U + dh
    if dh is not None and x is not None and need_V:
        dV = rows_of(dh).T @ rows_of(x)
    return dx, dU, dV, dvalues, dbias


class _InputGradient(torch.autograd.Function):
    """``dy (base + U V + S)``."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        U: Tensor | None,
        V: Tensor | None,
        values: Tensor,
        base: Tensor | None,
        pattern: SparsePattern,
    ) -> Tensor:
        ctx.save_for_backward(dy, U, V, values, base)
        ctx.pattern = pattern
        wanted = True, False, False, False
        return _call_backward(dy, None, U, V, pattern, values, base, None, wanted)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, U, V, values, base = ctx.saved_tensors
        need_dy, need_U, need_V, need_values, *_ = ctx.needs_input_grad
        ddy = dU = dV = dvalues = None
        if need_dy:
            ddy = linear(g, U, V, ctx.pattern, values, None, base)
        if need_U:
            dU = rows_of(dy).T @ rows_of(g @ V.T)
        if need_V:
            dV = rows_of(dy @ U).T @ rows_of(g)
        if need_values:
            dvalues = sampled(dy, g, ctx.pattern)
        return ddy, dU, dV, dvalues, None, None


class _SampledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, pattern: SparsePattern) -> Tensor:
        need_dy, need_x, _ = ctx.needs_input_grad
        ctx.save_for_backward(dy if need_x else None, x if need_dy else None)
        ctx.pattern = pattern
        return _call_sampled(dy, x, pattern)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, x = ctx.saved_tensors
        pattern = ctx.pattern
        ddy = dx = None
        if x is not None:
            ddy = linear(x, None, None, pattern, g, None, None)
        if dy is not None:
            other, permutation = pattern.transpose()
            dx = linear(dy, None, None, other, g[permutation], None, None)
        return ddy, dx, None
