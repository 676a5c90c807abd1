# SPDX-License-Identifier: Apache-2.0
"""Which entries of a sparse matrix may differ from zero."""

from .pattern import SparsePattern

__all__ = ["SparsePattern"]
