# SPDX-License-Identifier: Apache-2.0
"""Sparse-plus-low-rank layers on a GPU, as CUDA graphs: sm.ops.sparse_low_rank_linear against a
dense layer, against its parts as separate calls, and against SLTrain's published layer in torch.

python bench/sparse_low_rank_on_gpu.py [--device cuda] [--tiny] [--json FILE]
dense, parts, sltrain: their time over ours. `sampled`: sm.ops.sampled_matmul against dy^T x, then
taking its entries; dense is dy^T x alone.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from harness import check, measure, parser, start, write
from torch import Tensor

import structmat as sm


@dataclass(frozen=True)
class Case:
    """A square layer of n inputs."""

    tokens: int
    family: str = "uniform"
    passes: str = "forward"  # "backward": forward and all gradients; "sampled"
    density: float = 0.03
    dense: float = 0.0  # times as fast as that, wanted
    parts: float = 0.0
    sltrain: float = 0.0
    n: int = 4096
    rank: int = 128


GOALS = [
    Case(1, dense=2.0, parts=1.0),
    Case(16, parts=1.0),
    Case(32, parts=1.0),
    Case(128, dense=1.1),
    Case(4096, dense=0.8),
    Case(4096, "columns", dense=2.7),
    Case(4096, "vector16", dense=2.0),
    Case(4096, "block16", dense=2.0),
    Case(1, passes="backward", sltrain=1.5),
    Case(128, passes="backward", sltrain=1.5),
    Case(4096, passes="backward", sltrain=1.5),
    Case(4096, passes="sampled", dense=1 / 1.3),
    Case(4096, "vector16", passes="sampled", dense=1.5),
]
# Where the ways to run it meet: thresholds of sparse_low_rank_plan.h.
GRID = [Case(t, density=d) for d in (0.01, 0.03, 0.1) for t in (8, 33, 64, 256, 1023, 1024, 16384)]
GRID += [
    Case(t, family, density=d)
    for family in ("vector16", "block16")
    for d in (0.03, 0.1, 0.12)  # above 0.105 as any support
    for t in (33, 256, 16384)
]
GRID += [Case(4096, "block16", "backward")]
GRID += [
    Case(t, "vector16", "backward", d)
    for d in (0.01, 0.03, 0.06, 0.07)
    for t in (1023, 1024, 4096, 16384)
]
TINY = [
    Case(2, n=48, rank=4, density=0.2),
    Case(40, "columns", "backward", n=48, rank=4, density=0.2),
    Case(40, passes="sampled", n=48, rank=4, density=0.2),
    Case(40, "block16", passes="sampled", n=176, rank=4, density=0.09),
    Case(40, "vector16", "backward", n=48, rank=4, density=0.08),
]


class SLTrain(torch.autograd.Function):
    """W = U V, the entries of S scattered into it; its backward builds W and dW, both dense."""

    @staticmethod
    def weight(U: Tensor, V: Tensor, index: Tensor, values: Tensor) -> Tensor:
        W = U @ V
        W.view(-1).scatter_add_(0, index, values)
        return W

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, V: Tensor, index: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, U, V, index, values)
        return x @ SLTrain.weight(U, V, index, values).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, U, V, index, values = ctx.saved_tensors
        dx = dy @ SLTrain.weight(U, V, index, values)
        dW = dy.T @ x
        return dx, dW @ V.T, U.T @ dW, None, dW.view(-1).gather(0, index)


def row(case: Case, args: Any) -> dict[str, Any]:
    n, r, tokens, device, dtype = case.n, case.rank, case.tokens, args.device, torch.bfloat16
    backward = case.passes == "backward"

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    pattern = sm.SparsePattern.random(n, n, case.density, family=case.family).to(device)
    x, dy = normal(tokens, n), normal(tokens, n)
    U, V = normal(n, r, scale=r**-0.5), normal(r, n, scale=n**-0.5)
    values = normal(pattern.nnz, scale=n**-0.5)
    W = U @ V + pattern.scatter(values)
    index = pattern.to_mask().flatten().nonzero().flatten()

    def parts(x: Tensor, U: Tensor, V: Tensor, values: Tensor) -> Tensor:
        return sm.ops.sparse_linear(x, pattern, values) + (x @ V.T) @ U.T

    def run(function: Any, *leaves: Tensor) -> Any:
        if not backward:
            return function(*leaves)
        return torch.autograd.grad(function(*leaves), leaves, dy)

    leaves = [t.requires_grad_(backward) for t in (x, U, V, values)]
    ours = {
        "structmat": lambda: run(
            lambda x, U, V, values: sm.ops.sparse_low_rank_linear(x, U, V, pattern, values), *leaves
        ),
        "parts": lambda: run(parts, *leaves),
        "sltrain": lambda: run(
            lambda x, U, V, values: SLTrain.apply(x, U, V, index, values), *leaves
        ),
    }
    dense = {"dense": lambda: run(torch.nn.functional.linear, x, W.requires_grad_(backward))}
    if case.passes == "sampled":
        ours = {
            "structmat": lambda: sm.ops.sampled_matmul(dy, x, pattern),
            "parts": lambda: (dy.T @ x).view(-1)[index],
        }
        dense = {"dense": lambda: dy.T @ x}
    with contextlib.nullcontext() if backward else torch.no_grad():
        check(ours, ours["parts"](), 3e-2)
        seconds = measure({**ours, **dense}, device, budget=0.2, tiny=args.tiny)
    ratio = {name: seconds[name] / seconds["structmat"] for name in seconds if name != "structmat"}
    wanted = {"dense": case.dense, "parts": case.parts, "sltrain": case.sltrain}
    return {
        **{key: getattr(case, key) for key in ("n", "rank", "density", "family", "tokens")},
        "passes": case.passes,
        "dtype": "bfloat16",
        "seconds": seconds,
        "ratio": ratio,
        "wanted": wanted,
        "met": all(ratio.get(name, 0.0) >= least for name, least in wanted.items()),
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    goals, grid = (TINY, []) if args.tiny else (GOALS, GRID)
    print(f"{'family':>8} {'density':>7} {'tokens':>6} {'passes':>8} {'ours us':>9} {'dense':>6} "
          f"{'parts':>6} {'sltrain':>7}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    try:
        for case in [*goals, *grid]:
            found = row(case, args)
            ratio = found["ratio"]
            met = "" if case not in goals else "  met" if found["met"] else f"  {found['wanted']}"
            print(f"{case.family:>8} {case.density:7.2f} {case.tokens:6} {case.passes:>8} "
                  f"{1e6 * found['seconds']['structmat']:9.1f} {ratio['dense']:6.2f} "
                  f"{ratio['parts']:6.2f} {ratio.get('sltrain', 0.0):7.2f}{met}",
                  flush=True)  # fmt: skip
            rows.append(found)
    finally:  # of an interrupted run too
        write(args, "sparse_low_rank_on_gpu", rows)
        print(f"{sum(found['met'] for found in rows[: len(goals)])} of {len(goals)} goals met")


if __name__ == "__main__":
    main()
