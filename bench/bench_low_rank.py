# SPDX-License-Identifier: Apache-2.0
"""sm.ops.low_rank_linear against torch's (x @ V.T) @ U.T + b.

python bench/bench_low_rank.py [--device cuda] [--tiny] [--dtype NAME] [--passes NAME] [--json FILE]
ratio: torch's time over ours. GB/s counts each operand and result once, share is the time of the
measured roofline over ours.
"""

import contextlib
from itertools import product
from typing import Any

import torch
from harness import Roofline, check, measure, parser, start, summarize_ratios, write

import structmat as sm

GRID = list(product((1, 16, 256, 4096), (384, 768, 4096), (8, 4)))
TINY = [(1, 48, 4), (20, 48, 4)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-13}


def case(tokens: int, n: int, r: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    shapes = [(tokens, n), (n, r), (r, n), (n,)]
    scales = [1.0, r**-0.5, n**-0.5, 1.0]
    return [
        (torch.randn(*shape, device=device) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def plain(x: Any, U: Any, V: Any, b: Any) -> Any:
    return (x @ V.T) @ U.T + b


def row(
    tokens: int, n: int, r: int, dtype: torch.dtype, passes: str, args: Any, roofline: Roofline
) -> dict[str, Any]:
    given = case(tokens, n, r, dtype, args.device)
    backward = passes == "backward"
    dy = torch.randn(tokens, n, device=args.device).to(dtype)

    def run(function: Any, *arguments: Any) -> Any:
        if not backward:
            return function(*arguments)
        return torch.autograd.grad(function(*arguments), arguments, dy.to(arguments[0].dtype))

    with contextlib.nullcontext() if backward else torch.no_grad():
        leaves = [a.requires_grad_(backward) for a in given]
        contenders = {
            "structmat": lambda: run(sm.ops.low_rank_linear, *leaves),
            "torch": lambda: run(plain, *leaves),
        }
        if tokens * n * r <= 1 << 28:  # a double-precision answer takes long beyond that
            exact = run(plain, *[a.detach().double().requires_grad_(backward) for a in given])
            check(contenders, exact, TOLERANCE[dtype])
        seconds = measure(contenders, args.device, tiny=args.tiny)
    flops = 4 * tokens * r * n * (3 if backward else 1)
    # Forward: x, U, V, y. With gradients: x, U, V read twice, h, dy, y, and the three gradients.
    numbers = 2 * tokens * n + 2 * n * r
    if backward:
        numbers += 3 * tokens * n + 4 * n * r + 2 * tokens * r
    bytes_ = numbers * dtype.itemsize
    ours = seconds["structmat"]
    return {
        "tokens": tokens,
        "n": n,
        "r": r,
        "dtype": str(dtype).removeprefix("torch."),
        "passes": passes,
        "seconds": seconds,
        "ratio": seconds["torch"] / ours,
        "gflops": flops / ours / 1e9,
        "gbytes": bytes_ / ours / 1e9,
        "share": roofline.floor(flops, bytes_, dtype) / ours,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--passes", action="append", choices=["forward", "backward"])
    options.add_argument("--tokens", action="append", type=int, help="only these (repeatable)")
    args = options.parse_args()
    start(args)
    roofline = Roofline(args.device, args.tiny)
    rows, summary = [], []
    for name in args.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        print(
            f"{name}: {roofline.flops(dtype) / 1e9:.0f} GFLOP/s, "
            f"{roofline.bandwidth() / 1e9:.0f} GB/s measured here"
        )
        for passes in args.passes or ["forward", "backward"]:
            head = "forward" if passes == "forward" else "forward and backward"
            print(f"{head:>20} {'tokens':>6} {'n':>5} {'r':>5} {'ours us':>10} {'torch us':>10} "
                  f"{'ratio':>6} {'GFLOP/s':>8} {'GB/s':>6} {'share':>6}")  # fmt: skip
            found = []
            for tokens, n, part in TINY if args.tiny else GRID:
                if args.tokens and tokens not in args.tokens:
                    continue
                r = row(tokens, n, n // part, dtype, passes, args, roofline)
                found.append(r)
                ours, theirs = (1e6 * r["seconds"][name] for name in ("structmat", "torch"))
                print(f"{'':20} {tokens:6} {n:5} {n // part:5} {ours:10.1f} {theirs:10.1f} "
                      f"{r['ratio']:6.2f} {r['gflops']:8.0f} {r['gbytes']:6.0f} "
                      f"{r['share']:6.2f}", flush=True)  # fmt: skip
            ratios = summarize_ratios(found)
            mean, least = ratios["geometric_mean"], ratios["least"]
            print(f"{'':20} geometric mean {mean:.2f}, least {least:.2f}")
            summary.append({"dtype": name, "passes": passes, **ratios})
            rows += found
    write(args, "low_rank", rows, summary=summary)


if __name__ == "__main__":
    main()
