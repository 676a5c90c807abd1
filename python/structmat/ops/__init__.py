# SPDX-License-Identifier: Apache-2.0
"""Products of structured matrices."""

from .low_rank import low_rank_linear

__all__ = ["low_rank_linear"]
