# SPDX-License-Identifier: Apache-2.0
"""Monarch weights: conversions from and to other layouts, and to dense matrices."""

from .conversions import (
    from_blockdiag_butterfly,
    from_btt,
    to_blockdiag_butterfly,
    to_btt,
    to_dense,
)

__all__ = [
    "from_blockdiag_butterfly",
    "from_btt",
    "to_blockdiag_butterfly",
    "to_btt",
    "to_dense",
]
