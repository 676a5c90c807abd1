# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are compressed, and how they are replaced."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from ..nn import BlockDiagonalLinear, LowRankLinear, MonarchLinear, SparseLowRankLinear
from .factor import Factors

STRUCTURED = (LowRankLinear, MonarchLinear, BlockDiagonalLinear, SparseLowRankLinear)
Filter = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


@dataclass(eq=False)
class Target:
    """One weight to compress and every place it is used at: more than one where layers are tied."""

    places: dict[str, nn.Module]

    @property
    def name(self) -> str:
        return next(iter(self.places))

    @property
    def module(self) -> nn.Module:
        return next(iter(self.places.values()))

    @property
    def weight(self) -> Tensor:
        """``(m, n)``; Conv1D of transformers stores the transpose."""
        weight = weight_of(self.module).detach()
        return weight if isinstance(self.module, nn.Linear) else weight.T

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    @property
    def modules(self) -> list[nn.Module]:
        """Each module once, however many names it has."""
        return list(dict.fromkeys(self.places.values()))

    def replacements(self, factors: Factors) -> dict[str, LowRankLinear]:
        """A layer for each place. Tied layers share ``U`` and ``V``, and a bias they had in common.

        The bias is the old layer's own parameter, so that whatever else uses it still does.
        """
        made: dict[nn.Module, LowRankLinear] = {}
        first: LowRankLinear | None = None
        for module in self.modules:
            weight = weight_of(module)
            layer = LowRankLinear._of(factors.U, factors.V, bias_of(module), weight)
            if first is None:
                first = layer
            else:
                layer.U, layer.V = first.U, first.V
            made[module] = layer
        return {name: made[module] for name, module in self.places.items()}


def weight_of(module: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, module.weight)


def bias_of(module: nn.Module) -> nn.Parameter | None:
    return cast(nn.Parameter | None, module.bias)


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` itself, or the Conv1D of transformers: not their subclasses, whose forward may
    do more than a product."""
    kind = type(module)
    return kind is nn.Linear or (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    )


def find_targets(model: nn.Module, filter: Filter) -> list[Target]:
    """The chosen layers in the order of ``model.named_modules()``, grouped by weight.

    Raises:
        ValueError: no layer chosen, or none by one of the patterns; a chosen layer has hooks; a
            chosen weight is also used elsewhere (as an embedding, say), or has NaN or Inf.
    """
    if filter is not None and not callable(filter):
        filter = [filter] if isinstance(filter, str) else list(filter)
    chosen = _matcher(filter)
    places: dict[Hashable, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules(remove_duplicate=False):
        if name and is_linear(module) and chosen(name, module):  # the top module has no place
            _check_plain(name, module)
            places[_identity(weight_of(module))][name] = module
    for pattern in filter if isinstance(filter, list) else []:
        if not any(fnmatchcase(name, pattern) for found in places.values() for name in found):
            raise ValueError(f"compress: no layer matched filter {pattern!r}")
    users: dict[Hashable, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[_identity(parameter)].append(name)
    targets = []
    for key, found in places.items():
        others = [name for name in users[key] if name.removesuffix(".weight") not in found]
        target = Target(found)
        if others:
            if filter is None:
                continue  # tied to something that must stay dense: stays as it is, and tied
            raise ValueError(
                f"compress: {target.name} shares its weight with {others[0]}, which stays dense; "
                "leave it out by filter"
            )
        if not target.weight.is_floating_point() or target.weight.is_meta:
            raise ValueError(
                f"compress: the weight of {target.name} must be of floating point and loaded, got "
                f"{target.weight.dtype} on {target.weight.device}"
            )
        if not torch.isfinite(target.weight).all():
            raise ValueError(f"compress: the weight of {target.name} has NaN or Inf")
        targets.append(target)
    if not targets:
        raise ValueError(
            "compress: no layer passed filter"
            if filter is not None
            else "compress: the model contains no nn.Linear or Conv1D"
        )
    return targets


def _identity(parameter: Tensor) -> Hashable:
    """The same for parameters that are one, or that view the same memory alike."""
    if parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr(), tuple(parameter.shape), parameter.stride()


def _check_plain(name: str, module: nn.Module) -> None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks) or "forward" in vars(module):
        raise ValueError(
            f"compress: {name} has hooks or a forward of its own, which its replacement would not "
            "have; remove them or leave it out by filter"
        )


def replace(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts each layer in its place, in the mode of the one there, learning what that one did."""
    for name, layer in layers.items():
        old = model.get_submodule(name)
        for part, parameter in layer.named_parameters():
            if not parameter.requires_grad:  # frozen by its layer
                continue
            weight = next(old.parameters()) if isinstance(old, STRUCTURED) else weight_of(old)
            source = bias_of(old) if part == "bias" else weight
            parameter.requires_grad_((weight if source is None else source).requires_grad)
        layer.train(old.training)
    put(model, layers)


def put(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Sets each named submodule, and nothing else."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


def _matcher(
    filter: list[str] | Callable[[str, nn.Module], bool] | None,
) -> Callable[[str, nn.Module], bool]:
    if filter is None:
        return lambda name, module: True
    if callable(filter):
        return filter
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in filter)
