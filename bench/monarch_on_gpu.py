# SPDX-License-Identifier: Apache-2.0
"""What bench_monarch.py measures only on a GPU: sm.ops.monarch_linear against a dense layer and
against batched products, all as CUDA graphs: the goals, and a grid of sizes.

python bench/monarch_on_gpu.py [--device cuda] [--tiny] [--json FILE]
dense, bmm: their time over ours. floor: the time that FLOPs and bytes allow at the rates measured
in the same run, x, y and the weights counted once, over ours.
"""

import contextlib
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from harness import Roofline, check, measure, parser, start, write

import structmat as sm


@dataclass(frozen=True)
class Case:
    """A square layer of n inputs in `blocks` blocks, of as many hidden units as inputs."""

    n: int
    blocks: int
    tokens: int
    backward: bool = False
    dense: float = 0.0  # times as fast as that, wanted
    bmm: float = 0.0

    @property
    def rank(self) -> int:
        return max(1, self.n // self.blocks**2)


GOALS = [
    Case(1024, 16, 65536, dense=1.8, bmm=3.0),
    Case(4096, 64, 4096, dense=5.0, bmm=2.5),
    Case(4096, 16, 4096, dense=4.0, bmm=1.6),
    Case(1024, 16, 65536, True, dense=1.7),
    Case(4096, 16, 64, dense=2.5),
]
GRID = [Case(*case) for case in product((1024, 2048, 4096), (4, 16, 32), (1, 64, 4096, 65536))]
TINY = [Case(32, 4, 5, dense=1.0, bmm=1.0), Case(32, 4, 40, True), Case(16, 2, 3)]
BETTER = 1 / 1.05  # of the better of the two on the grid: never slower than 1.05 times


def bmm(x: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor) -> torch.Tensor:
    """Two batched products and the permutations around them, as published."""
    K, J, R, I = W1.shape
    h = x.view(-1, K, I).transpose(0, 1) @ W1.view(K, J * R, I).mT
    h = h.view(K, -1, J, R).permute(2, 1, 0, 3).reshape(J, -1, K * R)
    y = h @ W2.view(J, W2.shape[1], K * R).mT
    return y.transpose(0, 1).reshape(len(x), -1)


def row(case: Case, args: Any, roofline: Roofline) -> dict[str, Any]:
    n, b, r, tokens = case.n, case.blocks, case.rank, case.tokens
    dtype, device = torch.bfloat16, args.device
    i = n // b

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    x, dy = normal(tokens, n), normal(tokens, n)
    W1, W2 = normal(b, b, r, i, scale=i**-0.5), normal(b, i, b, r, scale=(b * r) ** -0.5)
    W = normal(n, n, scale=n**-0.5)

    def run(function: Any, *leaves: torch.Tensor) -> Any:
        if not case.backward:
            return function(*leaves)
        return torch.autograd.grad(function(*leaves), leaves, dy)

    leaves = [t.requires_grad_(case.backward) for t in (x, W1, W2, W)]
    contenders = {
        "structmat": lambda: run(sm.ops.monarch_linear, *leaves[:3]),
        "bmm": lambda: run(bmm, *leaves[:3]),
    }
    with contextlib.nullcontext() if case.backward else torch.no_grad():
        check(contenders, contenders["bmm"](), 2e-2)
        contenders["dense"] = lambda: run(torch.nn.functional.linear, leaves[0], leaves[3])
        seconds = measure(contenders, device, budget=0.2, tiny=args.tiny)
    passes = 3 if case.backward else 1
    flops = passes * 4 * tokens * b * b * r * i
    numbers = (passes + passes // 2) * 2 * tokens * n + passes * 2 * b * b * r * i
    ours = seconds["structmat"]
    ratio = {name: seconds[name] / ours for name in ("dense", "bmm")}
    return {
        "n": n,
        "blocks": b,
        "rank": r,
        "tokens": tokens,
        "passes": "forward and backward" if case.backward else "forward",
        "dtype": "bfloat16",
        "seconds": seconds,
        "ratio": ratio,
        "wanted": {"dense": case.dense, "bmm": case.bmm},
        "met": ratio["dense"] >= case.dense and ratio["bmm"] >= case.bmm,
        "floor": roofline.floor(flops, numbers * dtype.itemsize, dtype),
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    roofline = Roofline(args.device, args.tiny)
    goals, grid = (TINY[:2], TINY[2:]) if args.tiny else (GOALS, GRID)
    print(f"{'n':>5} {'blocks':>6} {'tokens':>6} {'passes':>20} {'ours us':>9} {'dense':>6} "
          f"{'bmm':>6} {'floor':>6}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    try:
        for case in [*goals, *grid]:
            found = row(case, args, roofline)
            ours, ratio = found["seconds"]["structmat"], found["ratio"]
            met = ""
            if case in goals:
                met = "  met" if found["met"] else f"  wanted {case.dense} and {case.bmm}"
            else:
                found["met"] = min(ratio.values()) >= BETTER
                met = "" if found["met"] else "  slower than the better of the two"
            print(f"{case.n:5} {case.blocks:6} {case.tokens:6} {found['passes']:>20} "
                  f"{1e6 * ours:9.1f} {ratio['dense']:6.2f} {ratio['bmm']:6.2f} "
                  f"{found['floor'] / ours:6.2f}{met}", flush=True)  # fmt: skip
            rows.append(found)
    finally:  # of an interrupted run too
        write(args, "monarch_on_gpu", rows)
        print(f"{sum(found['met'] for found in rows)} of {len(rows)} as wanted")


if __name__ == "__main__":
    main()
