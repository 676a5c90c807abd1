# SPDX-License-Identifier: Apache-2.0
"""The ``weight`` of a structured layer: the dense matrix, computed by whoever really reads it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_CHEAP = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "is_cuda",
        "is_meta",
        "layout",
        "requires_grad",
    )
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}


def product(
    layer: str, shape: tuple[int, int], factors: dict[str, Tensor], dense: Callable[..., Tensor]
) -> Tensor:
    """``dense(*factors.values())``, of this shape, put off until it is needed.

    Not so in a compiled graph, which drops what it does not use.
    """
    if torch.compiler.is_compiling():
        return dense(*factors.values())
    return _Product(layer, shape, factors, dense)


class _Product(Tensor):
    """Computed by what is called with it, unless that needs only its dtype or shape.

    Being no plain tensor, it also keeps ``nn.TransformerEncoderLayer`` from its fused path, which
    would multiply by the dense weight.
    """

    _layer: str
    _factors: dict[str, Tensor]
    _dense: Callable[..., Tensor]

    @staticmethod
    def __new__(
        cls,
        layer: str,
        shape: tuple[int, int],
        factors: dict[str, Tensor],
        dense: Callable[..., Tensor],
    ) -> "_Product":
        like = next(iter(factors.values()))
        made: _Product = Tensor._make_wrapper_subclass(
            cls,
            shape,
            dtype=like.dtype,
            device=like.device,
            requires_grad=torch.is_grad_enabled()
            and any(factor.requires_grad for factor in factors.values()),
        )
        made._layer, made._factors, made._dense = layer, factors, dense
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _CHEAP:
                return func(*args, **kwargs)
            name = func.__name__
            in_place = name in ("__set__", "__setitem__") or (name[-1] == "_" != name[-2])
            target = next(iter((*args, *kwargs.values())), None) if in_place else kwargs.get("out")
            if isinstance(target, cls):
                raise RuntimeError(
                    f"{target._layer}.weight is made of other parameters: "
                    f"change {' and '.join(target._factors)} instead"
                )
            args, kwargs = tree_map_only(
                cls, lambda made: made._dense(*made._factors.values()), (args, kwargs)
            )
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise NotImplementedError(
            f"the weight of a structured layer: {func} was called past __torch_function__; give it "
            "the product of the layer's factors itself"
        )
