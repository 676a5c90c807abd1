# SPDX-License-Identifier: Apache-2.0
"""Truncated SVDs of many blocks in one call; the operator is torch.ops.structmat.block_svd."""

import torch
from torch import Tensor


def block_svd(blocks: Tensor, rank: int, op: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The leading ``rank`` triplets of every block, and how much of it they leave out.

    Args:
        blocks: ``(a, b, p, q)`` of any strides.
        rank: 1 to ``min(p, q)``.
        op: who asks, for messages.

    Returns:
        ``U (a, b, p, rank)``, ``S (a, b, rank)``, ``Vh (a, b, rank, q)`` of float32 (float64 for
        float64), exact to its rounding, and ``norms (a, b, 2)`` of float64:
        ``||A||_F`` and ``||A - U diag(S) Vh||_F``.

    Raises:
        torch.linalg.LinAlgError: NaN or Inf in a block, or a singular value out of range.

    Cost: for ``p >= q``, ``p q^2 + 4/3 q^3`` FLOPs a block for few triplets, ``p q^2 + 9 q^3`` for
    many; one read of the blocks.
    """
    U, S, Vh, norms = torch.ops.structmat.block_svd.default(blocks, rank)
    if not bool((norms.isfinite().all() & S.isfinite().all()).item()):
        reason = (
            "a singular value exceeds the range of its dtype, or the iteration did not converge"
            if bool(blocks.isfinite().all())
            else "W contains NaN or Inf"
        )
        raise torch.linalg.LinAlgError(f"{op}: {reason}")  # type: ignore[attr-defined]
    return U, S, Vh, norms


@torch.library.register_fake("structmat::block_svd")
def _(A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *batch, p, q = A.shape
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    return (
        A.new_empty((*batch, p, rank), dtype=dtype),
        A.new_empty((*batch, rank), dtype=dtype),
        A.new_empty((*batch, rank, q), dtype=dtype),
        A.new_empty((*batch, 2), dtype=torch.float64),
    )
