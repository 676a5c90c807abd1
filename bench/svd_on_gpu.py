# SPDX-License-Identifier: Apache-2.0
"""What bench_svd.py measures only on a GPU: the time of one power step, and the linear layers of a
model of 7 billion parameters in one call."""

from typing import Any

import torch
from harness import Roofline, measure, synchronize

import structmat as sm


def block_of(k: int) -> int:
    """Columns of a block of the plan that CUDA follows (csrc/core/svd/svd_plan.h)."""
    return (k + 8 + 15) // 16 * 16


def step(A: torch.Tensor, k: int, args: Any, roofline: Roofline) -> dict[str, Any]:
    """A product with A or A^T and what makes its columns orthonormal, by the difference of 9 and 5
    sweeps, as graphs on a GPU; and the product alone, by torch."""
    m, n = A.shape
    X = torch.randn(n, block_of(k), device=A.device)
    found = measure(
        {
            "5 sweeps": lambda: torch.ops.structmat.randomized_svd(A, k, None, 5, 0, False),
            "9 sweeps": lambda: torch.ops.structmat.randomized_svd(A, k, None, 9, 0, False),
            "product": lambda: A.float() @ X,
        },
        args.device,
        budget=1.5,
        tiny=args.tiny,
    )
    seconds = (found["9 sweeps"] - found["5 sweeps"]) / 4
    flops = 2 * m * n * block_of(k)
    arithmetic = flops / roofline.flops(torch.float32)
    reading = A.element_size() * m * n / roofline.bandwidth()
    return {
        "m": m,
        "n": n,
        "rank": k,
        "dtype": str(A.dtype).removeprefix("torch."),
        "power step": seconds,
        "arithmetic": arithmetic,
        "reading": reading,
        "over the larger": seconds / max(arithmetic, reading),
        "torch's product": found["product"],
        "5 sweeps, graph": found["5 sweeps"],
    }


# Of one block of a Llama-like model: attention, then the gated feed-forward part.
BLOCK = [*[(4096, 4096)] * 4, *[(11_008, 4096)] * 2, (4096, 11_008)]


def model(args: Any) -> dict[str, Any]:
    """All linear layers in one list; torch has no such call and no bfloat16: one block of it."""
    shapes, k, blocks = ([(40, 30), (20, 60)], 4, 2) if args.tiny else (BLOCK, 64, 32)
    kinds = {}
    for m, n in set(shapes):  # singular values i^-1/2, but for the rounding to bfloat16
        r = min(m, n)
        left, right = (
            torch.linalg.qr(torch.randn(size, r, device=args.device)).Q for size in (m, n)
        )
        kinds[m, n] = (
            (left * torch.arange(1, r + 1, device=args.device) ** -0.5) @ right.T
        ).bfloat16()
    weights = [kinds[shape].clone() for _ in range(blocks) for shape in shapes]

    def ours(matrices: list[torch.Tensor]) -> None:
        sm.linalg.randomized_svd(matrices, k)
        synchronize(args.device)

    def theirs() -> None:
        for A in weights[: len(shapes)]:
            torch.svd_lowrank(A.float(), q=k + 10, niter=2)
        synchronize(args.device)

    functions = {
        "list": lambda: ours(weights),
        "loop": lambda: [ours([A]) for A in weights],
        "torch, one block": theirs,
    }
    seconds = measure(functions, "cpu", budget=4, tiny=args.tiny, least=2)
    return {
        "matrices": len(weights),
        "rank": k,
        "seconds": seconds,
        "ratio": {
            "loop": seconds["loop"] / seconds["list"],
            "torch": seconds["torch, one block"] * blocks / seconds["list"],
        },
    }
