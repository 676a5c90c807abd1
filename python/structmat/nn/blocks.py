# SPDX-License-Identifier: Apache-2.0
"""Features divided into blocks, for layers of any size, and what constructors accept."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..linalg.svd import check_integer
from ..ops.arguments import DTYPES


@dataclass(frozen=True)
class Blocks:
    """``size`` features in ``count`` consecutive blocks, as equal as can be.

    All have ``width`` features but the last ``short`` ones, which have one less, and are padded by
    a zero at their end where blocks of one size are wanted. No block is empty.
    """

    size: int
    count: int

    @property
    def width(self) -> int:
        return -(-self.size // self.count)

    @property
    def short(self) -> int:
        return self.width * self.count - self.size

    @property
    def padded(self) -> int:
        return self.width * self.count

    def pad(self, x: Tensor, layer: str = "Blocks") -> Tensor:
        """``(..., size)`` to ``(..., padded)``, a copy unless ``count`` divides ``size``.

        What a layer's operator would say of a wrong ``x`` is said here in the layer's name.
        """
        if not self.short:
            return x
        try:
            full, short = x.split(self._parts(self.width - 1), -1)
        except (RuntimeError, IndexError, AttributeError):
            self._check(x, layer)
            raise
        short = functional.pad(short.unflatten(-1, (self.short, self.width - 1)), (0, 1))
        return torch.cat([full, short.flatten(-2)], -1)

    def cut(self, y: Tensor) -> Tensor:
        """``(..., padded)`` to ``(..., size)``, a copy unless ``count`` divides ``size``."""
        if not self.short:
            return y
        full, short = y.split(self._parts(self.width), -1)
        short = short.unflatten(-1, (self.short, self.width))[..., :-1]
        return torch.cat([full, short.flatten(-2)], -1)

    def _check(self, x: Any, layer: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{layer}: x must be a tensor, got {type(x).__name__}") from None
        if x.layout != torch.strided:
            raise TypeError(f"{layer}: x must be dense, got layout {x.layout}") from None
        if x.dim() < 1:
            raise ValueError(f"{layer}: x must have at least 1 dimension, got 0") from None
        if x.shape[-1] != self.size:
            raise ValueError(
                f"{layer}: x has {x.shape[-1]} columns, wanted in_features = {self.size}"
            ) from None

    def _parts(self, of_short: int) -> list[int]:
        return [(self.count - self.short) * self.width, self.short * of_short]


def check_sizes(layer: str, in_features: int, out_features: int, n_blocks: int | None) -> None:
    """Raises unless both sizes are positive and have a feature for each block."""
    check_integer("in_features", in_features, layer)
    check_integer("out_features", out_features, layer)
    if in_features < 1 or out_features < 1:
        raise ValueError(
            f"{layer}: sizes must be positive, got {in_features} in, {out_features} out"
        )
    most = min(in_features, out_features)
    if n_blocks is not None:
        check_integer("n_blocks", n_blocks, layer)
    if n_blocks is not None and not 1 <= n_blocks <= most:
        raise ValueError(
            f"{layer}: n_blocks must be from 1 to {most} for {in_features} in, "
            f"{out_features} out, got {n_blocks}"
        )


def check_dtype(layer: str, dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"{layer}: dtype is {dtype}, wanted one of {', '.join(map(str, DTYPES))}")
