# SPDX-License-Identifier: Apache-2.0
"""Layers with structured weights, drop-in for nn.Linear."""

from .block_diagonal import BlockDiagonalLinear
from .low_rank import LowRankLinear
from .monarch import MonarchLinear
from .reselection import Reselection
from .sparse_low_rank import SparseLowRankLinear

__all__ = [
    "BlockDiagonalLinear",
    "LowRankLinear",
    "MonarchLinear",
    "Reselection",
    "SparseLowRankLinear",
]
