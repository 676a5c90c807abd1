# SPDX-License-Identifier: Apache-2.0
"""Features divided into blocks, for layers of any size."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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

    def pad(self, x: Tensor) -> Tensor:
        """``(..., size)`` to ``(..., padded)``, a copy unless ``count`` divides ``size``."""
        if not self.short:
            return x
        full, short = x.split(self._parts(self.width - 1), -1)
        short = functional.pad(short.unflatten(-1, (self.short, self.width - 1)), (0, 1))
        return torch.cat([full, short.flatten(-2)], -1)

    def cut(self, y: Tensor) -> Tensor:
        """``(..., padded)`` to ``(..., size)``, a copy unless ``count`` divides ``size``."""
        if not self.short:
            return y
        full, short = y.split(self._parts(self.width), -1)
        short = short.unflatten(-1, (self.short, self.width))[..., :-1]
        return torch.cat([full, short.flatten(-2)], -1)

    def _parts(self, of_short: int) -> list[int]:
        return [(self.count - self.short) * self.width, self.short * of_short]


def check_sizes(layer: str, in_features: int, out_features: int, n_blocks: int | None) -> None:
    """Raises unless both sizes are positive and have a feature for each block."""
    if in_features < 1 or out_features < 1:
        raise ValueError(
            f"{layer}: sizes must be positive, got {in_features} in, {out_features} out"
        )
    most = min(in_features, out_features)
    if n_blocks is not None and not 1 <= n_blocks <= most:
        raise ValueError(
            f"{layer}: n_blocks must be from 1 to {most} for {in_features} in, "
            f"{out_features} out, got {n_blocks}"
        )
