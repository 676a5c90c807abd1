# SPDX-License-Identifier: Apache-2.0
"""From dense layers to structured ones and back: what all of them do alike."""

import torch
from torch import Tensor, nn


def finite_weight(op: str, linear: nn.Linear) -> Tensor:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{op}: linear must be an nn.Linear, got {type(linear).__name__}")
    weight = linear.weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError(f"{op}: the weight has NaN or Inf")
    return weight


def finite_rows(op: str, linear: nn.Linear, inputs: Tensor) -> Tensor:
    """Samples ``(..., n)`` of the inputs of a layer as float64 rows on its device."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{op}: inputs must be a tensor, got {type(inputs).__name__}")
    if inputs.dim() == 0 or inputs.shape[-1] != linear.in_features or inputs.numel() == 0:
        raise ValueError(
            f"{op}: inputs must be (..., n) with at least one row and "
            f"n = {linear.in_features}, got {tuple(inputs.shape)}"
        )
    rows = inputs.detach().reshape(-1, linear.in_features)
    rows = rows.to(linear.weight.device, torch.float64)
    if not torch.isfinite(rows).all():
        raise ValueError(f"{op}: the inputs have NaN or Inf")
    return rows


def dense_like(layer: nn.Module, weight: Tensor, like: Tensor) -> nn.Linear:
    """An ``nn.Linear`` with this weight, in the dtype and on the device of ``like``, and the bias
    and the mode of a layer."""
    bias = layer.bias
    linear = nn.utils.skip_init(
        nn.Linear,
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        device=like.device,
        dtype=like.dtype,
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if isinstance(bias, Tensor):
            linear.bias.copy_(bias)
    return linear.train(layer.training)
