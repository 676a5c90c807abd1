# SPDX-License-Identifier: Apache-2.0
"""sm.ops.kronecker_sparse_linear of one factor (a, b, c, d) against torch's einsum and bmm.

python bench/bench_kronecker_sparse.py [--device cuda] [--tiny] [--json FILE]
ratio: the faster of theirs over ours; share: the time of the measured roofline over ours.
"""

import contextlib
from typing import Any

import torch
from harness import Roofline, check, measure, parser, start, write

import structmat as sm

# Block-diagonal, the outer factor of a Monarch matrix, both strided; tokens.
GRID = [
    ((64, 64, 64, 1), 1024),
    ((1, 64, 64, 64), 1024),
    ((8, 64, 64, 8), 1024),
    ((16, 64, 64, 4), 16),
]
TINY = [((2, 3, 4, 1), 5), ((2, 3, 4, 3), 5)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def einsum(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    a, _, c, d = W.shape
    return torch.einsum("tacd,abcd->tabd", x.view(-1, a, c, d), W).reshape(len(x), -1)


def bmm(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    a, b, c, d = W.shape
    inputs = x.view(-1, a, c, d).permute(1, 3, 0, 2).reshape(a * d, -1, c)
    y = inputs @ W.permute(0, 3, 2, 1).reshape(a * d, c, b)
    return y.view(a, d, -1, b).permute(2, 0, 3, 1).reshape(len(x), -1)


def row(
    size: tuple[int, ...], tokens: int, dtype: torch.dtype, back: bool, args: Any, roof: Roofline
) -> dict[str, Any]:
    a, b, c, d = size
    x = torch.randn(tokens, a * c * d, device=args.device).to(dtype)
    W = (torch.randn(*size, device=args.device) * c**-0.5).to(dtype)
    dy = torch.randn(tokens, a * b * d, device=args.device).to(dtype)
    leaves = [t.requires_grad_(back) for t in (x, W)]

    def run(function: Any, *given: torch.Tensor) -> Any:
        y = function(*given)
        return torch.autograd.grad(y, given, dy.to(y.dtype)) if back else y

    contenders = {
        "structmat": lambda: run(lambda x, W: sm.ops.kronecker_sparse_linear(x, [W]), *leaves),
        "einsum": lambda: run(einsum, *leaves),
        "bmm": lambda: run(bmm, *leaves),
    }
    with contextlib.nullcontext() if back else torch.no_grad():
        exact = run(einsum, *[t.detach().double().requires_grad_(back) for t in leaves])
        check(contenders, exact, TOLERANCE[dtype])
        seconds = measure(contenders, args.device, tiny=args.tiny)
    passes = 3 if back else 1
    flops = passes * 2 * tokens * a * b * c * d
    bytes_ = passes * (tokens * a * d * (b + c) + a * b * c * d) * dtype.itemsize
    ours = seconds["structmat"]
    return {
        "size": size,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "passes": "backward" if back else "forward",
        "seconds": seconds,
        "ratio": min(seconds["einsum"], seconds["bmm"]) / ours,
        "share": roof.floor(flops, bytes_, dtype) / ours,
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    roof = Roofline(args.device, args.tiny)
    print(f"{'(a, b, c, d)':>17} {'tokens':>6} {'dtype':>9} {'passes':>9} {'ours us':>9} "
          f"{'einsum':>9} {'bmm':>9} {'ratio':>6} {'share':>6}")  # fmt: skip
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for back in (False, True):
            for size, tokens in TINY if args.tiny else GRID:
                r = row(size, tokens, dtype, back, args, roof)
                us = {name: 1e6 * seconds for name, seconds in r["seconds"].items()}
                print(f"{size!s:>17} {tokens:6} {r['dtype']:>9} {r['passes']:>9} "
                      f"{us['structmat']:9.1f} {us['einsum']:9.1f} {us['bmm']:9.1f} "
                      f"{r['ratio']:6.2f} {r['share']:6.2f}", flush=True)  # fmt: skip
                rows.append(r)
    write(args, "kronecker_sparse", rows)


if __name__ == "__main__":
    main()
