# SPDX-License-Identifier: Apache-2.0
"""Products with a sparse weight plus one of low rank, W = U V + S."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..sparse_pattern import SparsePattern
from .arguments import (
    autocast,
    check_bias,
    check_dimensions,
    check_tensors,
    is_tracing,
    needs_composition,
    rows_of,
)

_linear = torch.ops.structmat.sparse_low_rank_linear.default
_linear_backward = torch.ops.structmat.sparse_low_rank_linear_backward.default
_sampled = torch.ops.structmat.sampled_matmul.default


def sparse_linear(
    x: Tensor, pattern: SparsePattern, values: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Applies a linear layer whose weight is sparse.

    ``y = x S^T + bias``, where ``S (m, n)`` has ``values`` on the support ``pattern`` and zeros
    elsewhere. :func:`sparse_low_rank_linear` without its other terms, of which all that it says
    holds.

    Args:
        x: ``(..., n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        pattern: of shape ``(m, n)``, on the device of ``x``.
        values: ``(nnz,)``, of the dtype and device of ``x``, in the order of the pattern.
        bias: ``(m,)`` or ``None``.

    Returns:
        ``(..., m)``. Any size may be zero.

    Raises:
        TypeError: an argument is no dense tensor or no pattern, or the dtypes differ or are not
            among the four.
        ValueError: shapes or devices do not fit together.

    Cost: ``2 T nnz`` FLOPs forward and ``4 T nnz`` for all gradients.

    Example:
        >>> import torch, structmat as sm
        >>> pattern = sm.SparsePattern.random(32, 64, 0.1)
        >>> x, values = torch.randn(5, 64), torch.randn(pattern.nnz)
        >>> y = sm.ops.sparse_linear(x, pattern, values)
        >>> torch.allclose(y, x @ pattern.scatter(values).T, rtol=1e-4, atol=1e-4)
        True
    """
    return _product("sparse_linear", x, None, None, pattern, values, bias, None)


def sparse_low_rank_linear(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    base: Tensor | None = None,
) -> Tensor:
    """Applies a linear layer whose weight is sparse plus of low rank, and perhaps a frozen matrix.

    ``y = x (U V + S)^T + bias``, or ``y = x (base + U V + S)^T + bias``, where ``S (m, n)`` has
    ``values`` on the support ``pattern`` and zeros elsewhere. The terms are computed side by side:
    neither ``U V + S`` nor a gradient of its size is ever formed.

    Args:
        x: ``(..., n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        U: ``(m, r)``, of the dtype and device of ``x``, like all tensors here.
        V: ``(r, n)``.
        pattern: of shape ``(m, n)``, on the device of ``x``.
        values: ``(nnz,)``, in the order of the pattern.
        bias: ``(m,)`` or ``None``.
        base: ``(m, n)`` or ``None``: a weight that is not trained, as in fine-tuning; beside
            float32 also bfloat16 or float16.

    Returns:
        ``(..., m)``. Any size may be zero, ``r`` and the number of values among them.

    Raises:
        TypeError: an argument is no dense tensor or no pattern, or the dtypes differ or are not
            among the four.
        ValueError: shapes or devices do not fit together, or ``base`` requires a gradient.

    Under ``torch.autocast`` the tensors are cast as those of ``torch.nn.functional.linear``. All
    but ``base`` have gradients, of second order too; that of ``values`` is computed on the support
    alone. Saved for the backward pass: ``x`` if ``V`` or ``values`` needs a gradient, ``h = x V^T``
    (``T r`` numbers) if ``U`` needs one, and the weights. The first gradient by ``x`` transposes
    the pattern, once. ``torch.func`` transforms, forward-mode differentiation, ``torch.export`` and
    ``torch.jit.trace`` take torch's own products instead, and for these alone ``S`` is scattered
    into a dense matrix.

    A 16-bit ``base`` beside float32 is widened part by part, 1 MB or so at a time on the CPU and 32
    MB on CUDA, so that it takes no more memory than its two bytes a number.

    Sums are kept in float32 (float64 for float64) and rounded once; on CUDA 16-bit types may round
    ``h`` before ``U`` takes it, or from 1,024 rows on ``U V + S``, as well. A row of ``x`` with a
    number that is not finite gives NaN in all its outputs, also where no entry of ``S`` meets it.
    The same inputs give the same bits for any number of threads.

    Cost: ``2 T (nnz + r (m + n))`` FLOPs forward and twice that for all gradients, ``6 T m n`` for
    both of the dense layer. Beyond results and gradients, forward and backward together take memory
    for ``T (m + n + 2 r)`` numbers at most.

    The layer is that of Han et al., SLTrain: a sparse plus low-rank approach for parameter and
    memory efficient pretraining, 2024, whose ``alpha / r`` may be multiplied into ``U`` or ``V``.

    Example:
        >>> import torch, structmat as sm
        >>> pattern = sm.SparsePattern.random(32, 64, 0.1)
        >>> x, values = torch.randn(5, 64), torch.randn(pattern.nnz)
        >>> U, V = torch.randn(32, 4), torch.randn(4, 64)
        >>> y = sm.ops.sparse_low_rank_linear(x, U, V, pattern, values)
        >>> W = U @ V + pattern.scatter(values)
        >>> torch.allclose(y, x @ W.T, rtol=1e-4, atol=1e-4)
        True
    """
    op = "sparse_low_rank_linear"
    if U is None or V is None:
        _check(op, x, U, V, pattern, values, bias, base, low_rank=True)
    return _product(op, x, U, V, pattern, values, bias, base)


def sampled_matmul(dy: Tensor, x: Tensor, pattern: SparsePattern) -> Tensor:
    """The entries of ``dy^T x`` on a support.

    ``values[e] = sum_t dy[t, i] x[t, j]`` for entry ``e = (i, j)`` of the pattern: the gradient of
    :func:`sparse_linear` by its values. ``dy^T x`` is never formed.

    Args:
        dy: ``(..., m)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        x: ``(..., n)``, of the dtype, device and leading sizes of ``dy``.
        pattern: of shape ``(m, n)``, on their device.

    Returns:
        ``(nnz,)``, of their dtype, in the order of the pattern; zeros where there are no rows.

    Raises:
        TypeError: an argument is no dense tensor or no pattern, or the dtypes differ or are not
            among the four.
        ValueError: shapes or devices do not fit together.

    Both have gradients, of any order. ``torch.func`` transforms, forward-mode differentiation,
    ``torch.export`` and ``torch.jit.trace`` compute ``dy^T x`` and take its entries. Sums are kept
    in float32 (float64 for float64) and rounded once; the same inputs give the same bits for any
    number of threads.

    Cost: ``2 T nnz`` FLOPs.

    Example:
        >>> import torch, structmat as sm
        >>> pattern = sm.SparsePattern.random(32, 64, 0.1)
        >>> dy, x = torch.randn(5, 32), torch.randn(5, 64)
        >>> values = sm.ops.sampled_matmul(dy, x, pattern)
        >>> torch.allclose(values, pattern.gather(dy.T @ x), rtol=1e-4, atol=1e-4)
        True
    """
    try:
        if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
            dy, x = autocast(dy, x)
        composes = needs_composition()
        if dy.shape[:-1] != x.shape[:-1] or (composes and not is_tracing()):
            _check_sampled(dy, x, pattern)
        if composes:
            return pattern.gather(rows_of(dy).T @ rows_of(x))
        if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
            if x.requires_grad:
                pattern.transpose()
            found: Tensor = _SampledMatmul.apply(dy, x, pattern)
            return found
        return _call_sampled(dy, x, pattern)
    except (RuntimeError, AttributeError, IndexError):
        _check_sampled(dy, x, pattern)  # says what was wrong, where it was the arguments
        raise


def _product(
    op: str,
    x: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    try:
        if pattern.shape[1] != x.shape[-1] or (base is not None and base.requires_grad):
            _check(op, x, U, V, pattern, values, bias, base)
        if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
            x, U, V, values, bias, base = autocast(x, U, V, values, bias, base)
        if needs_composition():
            if not is_tracing():  # where sizes are no numbers
                _check(op, x, U, V, pattern, values, bias, base)
            return _composed(x, U, V, pattern, values, bias, base)
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
    except (RuntimeError, AttributeError, IndexError):
        _check(op, x, U, V, pattern, values, bias, base)  # says what was wrong with the arguments
        raise


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


def _composed(
    x: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    pattern: SparsePattern,
    values: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    """In torch's operations, which have derivatives and batches of every kind."""
    W = pattern.scatter(values)
    y = functional.linear(x, W if base is None else base + W, bias)
    if U is not None and V is not None:
        y = y + functional.linear(functional.linear(x, V), U)
    return y


def _check(
    op: str,
    x: Any,
    U: Any,
    V: Any,
    pattern: Any,
    values: Any,
    bias: Any,
    base: Any,
    low_rank: bool = False,
) -> None:
    """Raises for arguments that do not fit together."""
    given = {"x": x}
    if low_rank or U is not None or V is not None:
        given |= {"U": U, "V": V}
    given |= {"values": values}
    if bias is not None:
        given["bias"] = bias
    check_tensors(op, given)
    if base is not None:
        _check_base(op, x, base)
    _check_pattern(op, "x", x, pattern)
    m, n = pattern.shape
    if x.shape[-1] != n:
        raise ValueError(f"{op}: x has {x.shape[-1]} columns, the pattern {m} x {n} takes {n}")
    if "U" in given:
        check_dimensions(op, "U", U, 2)
        check_dimensions(op, "V", V, 2)
        if U.shape[0] != m or V.shape[1] != n:
            raise ValueError(
                f"{op}: U is {tuple(U.shape)} and V {tuple(V.shape)}, the pattern {m} x {n}"
            )
        if U.shape[1] != V.shape[0]:
            raise ValueError(
                f"{op}: U {tuple(U.shape)} has rank {U.shape[1]}, V {tuple(V.shape)} {V.shape[0]}"
            )
    if tuple(values.shape) != (pattern.nnz,):
        raise ValueError(
            f"{op}: values is {tuple(values.shape)}, wanted ({pattern.nnz},) for the pattern"
        )
    check_bias(op, bias, m)
    if base is not None:
        if tuple(base.shape) != (m, n):
            raise ValueError(f"{op}: base is {tuple(base.shape)}, wanted ({m}, {n})")
        if base.requires_grad:
            raise ValueError(
                f"{op}: base is frozen and cannot require a gradient; give base.detach()"
            )


def _check_base(op: str, x: Tensor, base: Any) -> None:
    narrow = isinstance(base, Tensor) and base.dtype in (torch.bfloat16, torch.float16)
    if not narrow or x.dtype != torch.float32:
        check_tensors(op, {"x": x, "base": base})
    elif base.layout != torch.strided:
        raise TypeError(f"{op}: base must be dense, got layout {base.layout}")
    elif base.device != x.device:
        raise ValueError(f"{op}: base is on {base.device}, x on {x.device}")


def _check_sampled(dy: Any, x: Any, pattern: Any) -> None:
    op = "sampled_matmul"
    check_tensors(op, {"dy": dy, "x": x})
    _check_pattern(op, "dy", dy, pattern)
    m, n = pattern.shape
    if x.dim() < 1 or dy.shape[-1] != m or x.shape[-1] != n or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: dy is {tuple(dy.shape)} and x {tuple(x.shape)}, wanted (..., {m}) and "
            f"(..., {n}) for the pattern"
        )


def _check_pattern(op: str, name: str, tensor: Tensor, pattern: Any) -> None:
    if not isinstance(pattern, SparsePattern):
        raise TypeError(f"{op}: pattern must be a SparsePattern, got {type(pattern).__name__}")
    if pattern.device != tensor.device:
        raise ValueError(f"{op}: the pattern is on {pattern.device}, {name} on {tensor.device}")


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
        if values is None or (
            not compiling and (torch.is_grad_enabled() or dh is not None or dy is None)
        ):
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
            sampled = _call_sampled if torch.compiler.is_compiling() else sampled_matmul
            dvalues = sampled(dy, x, pattern)
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
            ddy = _product("sparse_low_rank_linear", g, U, V, ctx.pattern, values, None, base)
        if need_U:
            dU = rows_of(dy).T @ rows_of(g @ V.T)
        if need_V:
            dV = rows_of(dy @ U).T @ rows_of(g)
        if need_values:
            dvalues = sampled_matmul(dy, g, ctx.pattern)
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
            ddy = sparse_linear(x, pattern, g)
        if dy is not None:
            other, permutation = pattern.transpose()
            dx = sparse_linear(dy, other, g[permutation])
        return ddy, dx, None
