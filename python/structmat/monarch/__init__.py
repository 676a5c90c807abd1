# SPDX-License-Identifier: Apache-2.0
"""Monarch weights: projection of dense matrices."""

from .project import MonarchProjection, project, project_blockdiag_butterfly

__all__ = ["MonarchProjection", "project", "project_blockdiag_butterfly"]
