# SPDX-License-Identifier: Apache-2.0
"""Monarch weights: projection of dense matrices, conversions from and to other layouts."""

from .conversions import (
    from_blockdiag_butterfly,
    from_btt,
    to_blockdiag_butterfly,
    to_btt,
    to_dense,
)
from .project import MonarchProjection, project, project_blockdiag_butterfly

__all__ = [
    "MonarchProjection",
    "from_blockdiag_butterfly",
    "from_btt",
    "project",
    "project_blockdiag_butterfly",
    "to_blockdiag_butterfly",
    "to_btt",
    "to_dense",
]
