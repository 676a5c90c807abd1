# SPDX-License-Identifier: Apache-2.0
"""Products with a Monarch weight: two block-diagonal factors and a permutation between them."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    activation_of,
    autocast,
    check_bias,
    check_dimensions,
    check_tensors,
    is_tracing,
    needs_composition,
    rows_of,
)

_linear = torch.ops.structmat.monarch_linear.default
_linear_train = torch.ops.structmat.monarch_linear_train.default
_linear_backward = torch.ops.structmat.monarch_linear_backward.default
_OUTPUTS = {"blocked": False, "interleaved": True}


def monarch_linear(
    x: Tensor,
    W1: Tensor,
    W2: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    output: str = "blocked",
) -> Tensor:
    """Applies a linear layer whose weight is a Monarch matrix.

    For ``n = K I`` inputs and ``m = J L`` outputs

    ``h[t,k,j,r] = sum_i W1[k,j,r,i] x[t, k I + i]``
    ``y[t, j L + l] = act(sum_kr W2[j,l,k,r] h[t,k,j,r] + bias[j L + l])``

    Block ``(j, k)`` of the weight, ``L x I``, is ``sum_r W2[j,:,k,r] W1[k,j,r,:]^T``, of rank
    ``R`` at most. The weight is never formed, and in inference neither is ``h`` as a whole.

    Args:
        x: ``(..., K I)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        W1: ``(K, J, R, I)``, of the dtype and device of ``x``, like the other two.
        W2: ``(J, L, K, R)``. Both are read through their strides: views of other layouts need no
            copy (:mod:`structmat.monarch` makes them).
        bias: ``(J L,)``, in the order of the columns of the result, or ``None``.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (the exact one, by erf) or ``"silu"``,
            applied to the result. Fused into the product where no gradient is recorded, torch's own
            function where one is.
        output: ``"blocked"``: output ``(j, l)`` is column ``j L + l``; ``"interleaved"``: it is
            column ``l J + j``, as in the published Monarch.

    Returns:
        ``(..., J L)``. There is at least one block on either side (``K`` and ``J`` are positive);
        any other size may be zero, and with ``R = 0`` the result is ``act(bias)``.

    Raises:
        TypeError: an argument is no dense tensor, or the dtypes differ or are not among the four.
        ValueError: shapes or devices do not fit together, or an option is unknown.

    Under ``torch.autocast`` the tensors are cast as those of ``torch.nn.functional.linear``. All
    four have gradients, of second order too, and the same inputs give the same bits for any number
    of threads. Saved for the backward pass: ``x`` if a factor needs a gradient, and the factors;
    ``h`` is computed again, but on CUDA for ``I > 64``, where it is kept if ``W2`` needs a
    gradient. An activation saves what torch's does. ``torch.func`` transforms, forward-mode
    differentiation, ``torch.export`` and ``torch.jit.trace`` take two products of torch's.

    Cost: ``2 T H (I + L)`` FLOPs forward for ``H = K J R``, ``4 T H (I + L)`` for all gradients and
    ``2 T H I`` more where ``h`` is computed again, against ``2 T m n`` and ``4 T m n`` of the dense
    layer: a share of ``2 / K`` for ``K = J`` blocks and ``H = n`` of a square one. Sums are kept in
    float32 (float64 for float64); ``h`` of 16-bit tensors may be rounded to their type between the
    products.

    The form is that of Dao et al., Monarch: Expressive Structured Matrices for Efficient and
    Accurate Training, 2022, for any number of blocks and any rank.

    Example:
        >>> import torch, structmat as sm
        >>> x = torch.randn(5, 12)
        >>> W1, W2 = torch.randn(3, 2, 2, 4), torch.randn(2, 5, 3, 2)  # K, J, R, I and J, L, K, R
        >>> y = sm.ops.monarch_linear(x, W1, W2)
        >>> W = torch.einsum("jlkr,kjri->jlki", W2, W1).reshape(10, 12)
        >>> torch.allclose(y, x @ W.T, rtol=1e-4, atol=1e-4)
        True
    """
    act = activation_of("monarch_linear", activation)
    if not isinstance(output, str) or output not in _OUTPUTS:
        raise ValueError(f"monarch_linear: output is {output!r}, wanted blocked or interleaved")
    try:
        if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
            x, W1, W2, bias = autocast(x, W1, W2, bias)
        if needs_composition() and not is_tracing():  # where sizes are no numbers
            _check(x, W1, W2, bias)
        return product(x, W1, W2, bias, act, False, _OUTPUTS[output])
    except (RuntimeError, AttributeError):
        _check(x, W1, W2, bias)  # says what was wrong, where it was the arguments
        raise


def product(
    x: Tensor,
    W1: Tensor,
    W2: Tensor,
    bias: Tensor | None,
    activation: tuple[int, Any],
    interleaved_hidden: bool,
    interleaved_output: bool,
) -> Tensor:
    """monarch_linear of either order of the hidden units (structmat/monarch.h), unchecked."""
    code, function = activation
    if needs_composition():
        y = _composed(x, W1, W2, interleaved_hidden, interleaved_output)
        return function(y if bias is None else y + bias)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or W1.requires_grad
        or W2.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        y = _MonarchLinear.apply(x, W1, W2, bias, interleaved_hidden, interleaved_output)
        return function(y)
    return _linear(x, W1, W2, bias, code, interleaved_hidden, interleaved_output)


def _keeps_hidden(x: Tensor, W1: Tensor) -> bool:
    """Whether h is kept for the gradient of W2, instead of computed again.

    On a CPU a product of one tile is cheaper than T H numbers written and read. On a GPU computing
    h again takes 2 I FLOPs a number, which from some I on cost more than its bytes.
    """
    return x.is_cuda and W1.shape[3] > 64


def _check(x: Any, W1: Any, W2: Any, bias: Any, interleaved_hidden: bool = False) -> None:
    """Raises for arguments that do not fit together."""
    op = "monarch_linear"
    check_tensors(op, {"x": x, "W1": W1, "W2": W2} | ({} if bias is None else {"bias": bias}))
    check_dimensions(op, "W1", W1, 4)
    check_dimensions(op, "W2", W2, 4)
    (K, J1, R1, I), (J, L, K2, R2) = W1.shape, W2.shape
    if interleaved_hidden:
        chain, wanted = J1 == 1 and K2 == 1 and K * R1 == J * R2, "(K, 1, Q, I), (J, L, 1, S)"
    else:
        chain, wanted = J1 == J and K2 == K and R1 == R2, "(K, J, R, I) and (J, L, K, R)"
    shapes = f"{op}: W1 is {tuple(W1.shape)} and W2 is {tuple(W2.shape)}, wanted "
    if not chain:
        raise ValueError(shapes + wanted)
    if K == 0 or J == 0:
        raise ValueError(shapes + "at least one block in each")
    if x.shape[-1] != K * I:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} columns, W1 {tuple(W1.shape)} takes K I = {K * I}"
        )
    check_bias(op, bias, J * L)


def _outputs(W2: Tensor) -> int:
    return W2.shape[0] * W2.shape[1]


@torch.library.register_fake("structmat::monarch_linear")
def _(
    x: Tensor,
    W1: Tensor,
    W2: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    interleaved_hidden: bool = False,
    interleaved_output: bool = False,
) -> Tensor:
    _check(x, W1, W2, bias, interleaved_hidden)
    return x.new_empty((*x.shape[:-1], _outputs(W2)))


@torch.library.register_fake("structmat::monarch_linear_train")
def _(
    x: Tensor,
    W1: Tensor,
    W2: Tensor,
    bias: Tensor | None,
    interleaved_hidden: bool,
    interleaved_output: bool,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, W1, W2, bias, interleaved_hidden)
    y = x.new_empty((*x.shape[:-1], _outputs(W2)))
    hidden = (W2.shape[0], prod(x.shape[:-1]), W2.shape[2] * W2.shape[3])
    return y, x.new_empty(hidden if keep_hidden else (0,))


@torch.library.register_fake("structmat::monarch_linear_backward")
def _(
    dy: Tensor,
    x: Tensor | None,
    W1: Tensor,
    W2: Tensor,
    hidden: Tensor | None,
    interleaved_hidden: bool,
    interleaved_output: bool,
    need_x: bool,
    need_W1: bool,
    need_W2: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty((*dy.shape[:-1], W1.shape[0] * W1.shape[3]) if need_x else (0,)),
        W1.new_empty(W1.shape if need_W1 else (0,)),
        W2.new_empty(W2.shape if need_W2 else (0,)),
        dy.new_empty((_outputs(W2) if need_bias else 0,)),
    )


class _MonarchLinear(torch.autograd.Function):
    # As in low_rank.py: cheaper by 10 us a step than torch.library.register_autograd.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W1: Tensor,
        W2: Tensor,
        bias: Tensor | None,
        interleaved_hidden: bool,
        interleaved_output: bool,
    ) -> Tensor:
        need_x, need_W1, need_W2, *_ = ctx.needs_input_grad
        keep = need_W2 and _keeps_hidden(x, W1)
        y, hidden = _linear_train(x, W1, W2, bias, interleaved_hidden, interleaved_output, keep)
        weights = need_x or need_W1 or need_W2
        ctx.save_for_backward(
            x if need_W1 or need_W2 else None,
            W1 if weights else None,
            W2 if weights else None,
            hidden if keep else None,
        )
        ctx.interleaved = interleaved_hidden, interleaved_output
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W1, W2, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or W1 is None:
            found = _differentiable_backward(dy, x, W1, W2, ctx.interleaved, needs)
        else:
            found = _linear_backward(dy, x, W1, W2, hidden, *ctx.interleaved, *needs)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


# The same in torch's operations, which have derivatives of every kind. Hidden units lie by input
# block, (..., K, Q), or by output block, (..., J, S).


def _by_output(h: Tensor, W1: Tensor, W2: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return h.flatten(-2).unflatten(-1, (W2.shape[3], W2.shape[0])).transpose(-1, -2)
    return h.unflatten(-1, (W1.shape[1], W1.shape[2])).transpose(-2, -3).flatten(-2)


def _by_input(h: Tensor, W1: Tensor, W2: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return h.transpose(-1, -2).flatten(-2).unflatten(-1, (W1.shape[0], W1.shape[2]))
    return h.unflatten(-1, (W2.shape[2], W2.shape[3])).transpose(-2, -3).flatten(-2)


def _hidden(x: Tensor, W1: Tensor, W2: Tensor, interleaved: bool) -> Tensor:
    x = x.unflatten(-1, (W1.shape[0], W1.shape[3]))
    h = torch.einsum("...ki,kqi->...kq", x, W1.flatten(1, 2))
    return _by_output(h, W1, W2, interleaved)


def _composed(
    x: Tensor, W1: Tensor, W2: Tensor, interleaved_hidden: bool, interleaved_output: bool
) -> Tensor:
    h = _hidden(x, W1, W2, interleaved_hidden)
    y = torch.einsum("...js,jls->...jl", h, W2.flatten(2, 3))
    return (y.transpose(-1, -2) if interleaved_output else y).flatten(-2)


def _differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    W1: Tensor | None,
    W2: Tensor | None,
    interleaved: tuple[bool, bool],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    interleaved_hidden, interleaved_output = interleaved
    need_x, need_W1, need_W2, need_bias = needs
    dx = dW1 = dW2 = None
    rows = rows_of(dy)
    dbias = rows.sum(0) if need_bias else None
    if W1 is None or W2 is None:
        return dx, dW1, dW2, dbias
    J, L = W2.shape[:2]
    if interleaved_output:
        rows = rows.unflatten(1, (L, J)).transpose(1, 2)
    else:
        rows = rows.unflatten(1, (J, L))
    x_rows = None if x is None else rows_of(x)
    if need_W2 and x_rows is not None:
        h = _hidden(x_rows, W1, W2, interleaved_hidden)
        dW2 = torch.einsum("tjl,tjs->jls", rows, h).reshape(W2.shape)
    dh = torch.einsum("tjl,jls->tjs", rows, W2.flatten(2, 3))
    dh = _by_input(dh, W1, W2, interleaved_hidden)
    if need_x:
        dx = torch.einsum("tkq,kqi->tki", dh, W1.flatten(1, 2))
        dx = dx.reshape(*dy.shape[:-1], W1.shape[0] * W1.shape[3])
    if need_W1 and x_rows is not None:
        blocks = x_rows.unflatten(1, (W1.shape[0], W1.shape[3]))
        dW1 = torch.einsum("tkq,tki->kqi", dh, blocks).reshape(W1.shape)
    return dx, dW1, dW2, dbias
