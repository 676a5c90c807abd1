# SPDX-License-Identifier: Apache-2.0
"""Products of structured matrices."""

from .block_diagonal import block_diagonal_linear
from .kronecker_sparse import kronecker_sparse_linear
from .low_rank import low_rank_linear
from .monarch import monarch_linear
from .sparse_low_rank import sampled_matmul, sparse_linear, sparse_low_rank_linear

__all__ = [
    "block_diagonal_linear",
    "kronecker_sparse_linear",
    "low_rank_linear",
    "monarch_linear",
    "sampled_matmul",
    "sparse_linear",
    "sparse_low_rank_linear",
]
