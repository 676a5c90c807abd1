# SPDX-License-Identifier: Apache-2.0
"""Layers with structured weights, drop-in for nn.Linear."""

from .block_diagonal import BlockDiagonalLinear
from .low_rank import LowRankLinear
from .monarch import MonarchLinear

__all__ = ["BlockDiagonalLinear", "LowRankLinear", "MonarchLinear"]
