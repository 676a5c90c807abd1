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
from .sparse_low_rank_gradient import linear, sampled


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
    both of the dense layer; a base adds ``2 T m n`` forward and to the gradient of x. Beyond
    results and gradients, forward and backward together take memory for ``T (m + n + 2 r)`` numbers
    at most.

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
        return sampled(dy, x, pattern)
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
        return linear(x, U, V, pattern, values, bias, base)
    except (RuntimeError, AttributeError, IndexError):
        _check(op, x, U, V, pattern, values, bias, base)  # says what was wrong with the arguments
        raise


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
        check_base(op, base, "x", x, (m, n))
        if base.requires_grad:
            raise ValueError(
                f"{op}: base is frozen and cannot require a gradient; give base.detach()"
            )


def check_base(op: str, base: Any, name: str, other: Tensor, shape: tuple[int, int]) -> None:
    """Raises unless it is a base of this shape that may stand beside the tensor of that name."""
    check_tensors(op, {name: other, "base": base}, narrow=True)
    if tuple(base.shape) != shape:
        raise ValueError(f"{op}: base is {tuple(base.shape)}, wanted {shape}")


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
