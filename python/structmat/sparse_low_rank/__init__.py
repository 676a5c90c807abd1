# SPDX-License-Identifier: Apache-2.0
"""Sparse plus low-rank approximations of dense matrices."""

from .compensate import Compensation, compensate
from .decompose import SparseLowRank, decompose

__all__ = ["Compensation", "SparseLowRank", "compensate", "decompose"]
