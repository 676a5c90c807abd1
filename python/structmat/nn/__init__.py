# SPDX-License-Identifier: Apache-2.0
"""Layers with structured weights, drop-in for nn.Linear."""

from .low_rank import LowRankLinear

__all__ = ["LowRankLinear"]
