# SPDX-License-Identifier: Apache-2.0
"""Products with a block-diagonal weight: one Kronecker-sparse factor with d = 1."""

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
)
from .kronecker_sparse import product


def block_diagonal_linear(
    x: Tensor, W: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Applies a linear layer whose weight is block-diagonal.

    ``y[t, k q + j] = act(sum_i W[k,j,i] x[t, k p + i] + bias[k q + j])``

    Args:
        x: ``(..., blocks p)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        W: ``(blocks, q, p)``, of the dtype and device of ``x``, read through its strides.
        bias: ``(blocks q,)`` or ``None``.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (the exact one, by erf) or ``"silu"``,
            applied to the result. Fused into the product where no gradient is recorded, torch's own
            function where one is.

    Returns:
        ``(..., blocks q)``. Any size may be zero.

    Raises:
        TypeError: an argument is no dense tensor, or the dtypes differ or are not among the four.
        ValueError: shapes or devices do not fit together, or the activation is unknown.

    Autocast, gradients, transforms and determinism are those of
    :func:`kronecker_sparse_linear` with the one factor ``(blocks, q, p, 1)``. Cost:
    ``2 T blocks p q`` FLOPs forward and twice that for all gradients, one part in ``blocks`` of the
    dense layer's; ``x`` and ``W`` are saved.

    Example:
        >>> import torch, structmat as sm
        >>> x, W = torch.randn(5, 12), torch.randn(3, 2, 4)
        >>> y = sm.ops.block_diagonal_linear(x, W)
        >>> torch.allclose(y, x @ torch.block_diag(*W).T, rtol=1e-4, atol=1e-4)
        True
    """
    act = activation_of("block_diagonal_linear", activation)
    try:
        if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
            x, W, bias = autocast(x, W, bias)
        if needs_composition() and not is_tracing():  # where sizes are no numbers
            _check(x, W, bias)
        return product(x, W.unsqueeze(-1), bias, act)
    except (RuntimeError, AttributeError):
        _check(x, W, bias)  # says what was wrong, where it was the arguments
        raise


def _check(x: Any, W: Any, bias: Any) -> None:
    """Raises for arguments that do not fit together."""
    op = "block_diagonal_linear"
    check_tensors(op, {"x": x, "W": W} | ({} if bias is None else {"bias": bias}))
    check_dimensions(op, "W", W, 3)
    blocks, q, p = W.shape
    if x.shape[-1] != blocks * p:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} columns, W {tuple(W.shape)} takes {blocks * p}"
        )
    check_bias(op, bias, blocks * q)
