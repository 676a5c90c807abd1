# SPDX-License-Identifier: Apache-2.0
"""What the operators of linear layers do with their arguments alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What may follow a product: the operators' code (structmat/activation.h) and torch's function.
ACTIVATIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "none": (0, lambda z: z),
    "relu": (1, functional.relu),
    "gelu": (2, functional.gelu),
    "silu": (3, functional.silu),
}
is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]


def needs_composition() -> bool:
    """Whether torch's own operations must be taken.

    Our operators know no tangents and no batches of batches, and a graph that outlives this process
    would know no gradient of them; torch's products know all rules.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_exporting()
        or is_tracing()
    )


def autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Casts as torch.nn.functional.linear does under torch.autocast."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        a.to(dtype) if a is not None and a.is_floating_point() and a.dtype != torch.float64 else a
        for a in (x, *others)
    ]


def check_tensors(op: str, given: dict[str, Any], *, narrow: bool = False) -> None:
    """Raises unless all are dense, of the dtype and device of the first, which has columns.

    narrow: beside a first one in float32 the others may also be in bfloat16 or float16.
    """
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got layout {tensor.layout}")
    first, x = next(iter(given.items()))
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {first} is {x.dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    others = (torch.bfloat16, torch.float16) if narrow and x.dtype == torch.float32 else ()
    for name, tensor in given.items():
        if tensor.dtype not in (x.dtype, *others):
            wanted = " or ".join([f"{x.dtype} as {first}", *map(str, others)])
            raise TypeError(f"{op}: {name} is {tensor.dtype}, wanted {wanted}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {x.device}")
    if x.dim() < 1:
        raise ValueError(f"{op}: {first} must have at least 1 dimension, got 0")


def check_dimensions(op: str, name: str, tensor: Tensor, wanted: int) -> None:
    if tensor.dim() != wanted:
        raise ValueError(f"{op}: {name} must have {wanted} dimensions, got {tensor.dim()}")


def check_bias(op: str, bias: Tensor | None, size: int) -> None:
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != size):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, wanted ({size},)")


def activation_of(op: str, name: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {name!r}, wanted one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rows_of(a: Tensor) -> Tensor:
    """``(..., k)`` as a matrix, all leading sizes in one."""
    return torch.atleast_2d(a).flatten(0, -2)
