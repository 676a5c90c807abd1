# SPDX-License-Identifier: Apache-2.0
"""sm.ops.monarch_linear and block_diagonal_linear against what torch offers.

python bench/bench_monarch.py [--device cuda] [--tiny] [--dtype NAME] [--passes NAME] [--json FILE]
Contenders: pairs of einsums with the intermediate in three layouts, batched products with and
without transposed outputs made beforehand, the published form (fly), and, for as many tokens as it
bears, the dense layer. ratio: the fastest of them but dense, over ours; goal: what is wanted of it.
fly and dense: their times over ours. GB/s counts each operand and result once. GEMM and memory are
the shares reached of what is measured in the same run: the rate of a product of large matrices, the
bandwidth of a sum over memory that no cache holds. malloc keeps what is freed, for all of them.
"""

import contextlib
from typing import Any

import torch
from harness import (
    Roofline,
    check,
    keep_freed_memory,
    measure,
    parser,
    start,
    summarize_ratios,
    write,
)

import structmat as sm

# tokens, n, blocks and the ratios wanted of forward and forward with backward, in float32
MONARCH = [
    (1, 4096, 64, 1.5, None),
    (16, 4096, 64, 1.2, None),
    (128, 4096, 64, None, None),
    (1024, 4096, 64, 1.4, 1.5),
    (4096, 4096, 64, 2.4, 2.0),
    (4096, 1024, 32, 1.5, 1.6),
    (4096, 4096, 16, 1.3, 1.35),
]
BLOCK_DIAGONAL = [(16, 4096, 64), (1024, 4096, 64), (4096, 1024, 16)]
TINY_MONARCH = [(1, 48, 4, None, None), (20, 48, 4, None, None)]
TINY_BLOCK_DIAGONAL = [(20, 48, 4)]
BFLOAT16_GOAL = 1.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-13}
MOST_DENSE_TOKENS = 1024


def random(*shape: int, scale: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def einsum_pair(middle: str) -> Any:
    def run(x: Any, W1: Any, W2: Any, b: Any) -> Any:
        K, _, _, I = W1.shape
        h = torch.einsum(f"kjri,tki->{middle}", W1, x.view(-1, K, I))
        return torch.einsum(f"jlkr,{middle}->tjl", W2, h).reshape(len(x), -1) + b

    return run


def bmm_pair(x: Any, W1: Any, W2: Any, b: Any) -> Any:
    K, J, R, I = W1.shape
    tokens, L = len(x), W2.shape[1]
    h = torch.bmm(x.view(tokens, K, I).transpose(0, 1), W1.reshape(K, J * R, I).transpose(1, 2))
    h = h.view(K, tokens, J, R).permute(2, 1, 0, 3).reshape(J, tokens, K * R)
    y = torch.bmm(h, W2.reshape(J, L, K * R).transpose(1, 2))
    return y.transpose(0, 1).reshape(tokens, J * L) + b


def bmm_out(x: Any, W1: Any, W2: Any, b: Any) -> Any:
    """The results are written transposed into tensors made beforehand."""
    K, J, R, I = W1.shape
    tokens, L = len(x), W2.shape[1]
    h = x.new_empty(tokens, K, J * R)
    torch.bmm(
        x.view(tokens, K, I).transpose(0, 1),
        W1.reshape(K, J * R, I).transpose(1, 2),
        out=h.transpose(0, 1),
    )
    h = h.view(tokens, K, J, R).permute(2, 0, 1, 3).reshape(J, tokens, K * R)
    y = x.new_empty(tokens, J, L)
    torch.bmm(h, W2.reshape(J, L, K * R).transpose(1, 2), out=y.transpose(0, 1))
    return y.view(tokens, J * L) + b


def fly(x: Any, w1: Any, w2: Any, b: Any) -> Any:
    """The published operator: w1 (k, q, p), w2 (l, s, r), hidden unit r l + l', output s l + l'."""
    k, _, p = w1.shape
    l, s, r = w2.shape
    tokens = len(x)
    h = torch.bmm(x.view(tokens, k, p).transpose(0, 1), w1.transpose(1, 2))
    h = h.transpose(0, 1).reshape(tokens, r, l).permute(2, 0, 1).contiguous()
    y = torch.bmm(h, w2.transpose(1, 2))
    return y.permute(1, 2, 0).reshape(tokens, s * l) + b


def monarch_case(
    tokens: int, n: int, blocks: int, dtype: torch.dtype, device: str
) -> tuple[list[Any], list[Any], Any]:
    """Operands, those of the published form, and the dense weight."""
    width, rank = n // blocks, max(n // blocks**2, 1)
    hidden = blocks * rank
    given = [
        random(tokens, n, scale=1, dtype=dtype, device=device),
        random(blocks, blocks, rank, width, scale=width**-0.5, dtype=dtype, device=device),
        random(blocks, width, blocks, rank, scale=hidden**-0.5, dtype=dtype, device=device),
        random(n, scale=1, dtype=dtype, device=device),
    ]
    x, W1, W2, b = given
    w1 = W1.permute(0, 2, 1, 3).reshape(blocks, hidden, width).contiguous()
    published = [x, w1, W2.reshape(blocks, width, hidden).contiguous(), b]
    W = torch.einsum("jlkr,kjri->jlki", W2.double(), W1.double()).reshape(n, n).to(dtype)
    return given, published, W


def row(
    op: str, tokens: int, n: int, blocks: int, dtype: torch.dtype, passes: str, args: Any,
    roofline: Roofline,
) -> dict[str, Any]:  # fmt: skip
    backward = passes == "backward"
    dy = random(tokens, n, scale=1, dtype=dtype, device=args.device)

    def run(function: Any, leaves: list[Any]) -> Any:
        if not backward:
            return function(*leaves)
        return torch.autograd.grad(function(*leaves), leaves, dy.to(leaves[0].dtype))

    def leaves_of(operands: list[Any]) -> list[Any]:
        return [a.detach().clone().requires_grad_(backward) for a in operands]

    width = n // blocks
    with contextlib.nullcontext() if backward else torch.no_grad():
        others: dict[str, Any] = {}
        if op == "monarch":
            given, published, W = monarch_case(tokens, n, blocks, dtype, args.device)
            leaves, flies, dense = (
                leaves_of(given),
                leaves_of(published),
                leaves_of([given[0], W, given[3]]),
            )
            hidden = given[1].numel() // width
            numbers, flops = 2 * hidden * width, 4 * tokens * hidden * width
            ours = lambda: run(sm.ops.monarch_linear, leaves)  # noqa: E731
            for middle in ("tkjr", "jtkr", "ktjr"):
                pair = einsum_pair(middle)
                others[f"einsum {middle}"] = lambda pair=pair: run(pair, leaves)
            others["bmm"] = lambda: run(bmm_pair, leaves)
            if not backward:
                others["bmm out"] = lambda: run(bmm_out, leaves)
            exact = einsum_pair("tkjr")
        else:
            given = [
                random(tokens, n, scale=1, dtype=dtype, device=args.device),
                random(blocks, width, width, scale=width**-0.5, dtype=dtype, device=args.device),
                random(n, scale=1, dtype=dtype, device=args.device),
            ]
            leaves = leaves_of(given)
            numbers, flops = n * width, 2 * tokens * n * width
            ours = lambda: run(sm.ops.block_diagonal_linear, leaves)  # noqa: E731
            exact = lambda x, W, b: (  # noqa: E731
                torch.einsum("kqp,tkp->tkq", W, x.view(-1, blocks, width)).reshape(len(x), -1) + b
            )
            others["einsum"] = lambda: run(exact, leaves)
            others["bmm"] = lambda: run(
                lambda x, W, b: (
                    torch.bmm(x.view(-1, blocks, width).transpose(0, 1), W.transpose(1, 2))
                    .transpose(0, 1)
                    .reshape(len(x), -1)
                    + b
                ),
                leaves,
            )
        contenders = {"structmat": ours, **others}
        check(contenders, run(exact, leaves_of([a.double() for a in given])), TOLERANCE[dtype])
        if op == "monarch":  # answers of their own order
            contenders["fly"] = lambda: run(fly, flies)
            exact_fly = run(fly, leaves_of([a.double() for a in published]))
            check({"fly": contenders["fly"]}, exact_fly, TOLERANCE[dtype])
        seconds = measure(contenders, args.device, budget=1.5, tiny=args.tiny)
        if op == "monarch" and tokens <= MOST_DENSE_TOKENS:
            # Apart from the others: its weight drives theirs out of the caches.
            linear = {"dense": lambda: run(torch.nn.functional.linear, dense)}
            seconds |= measure(linear, args.device, tiny=args.tiny)
    # Forward: x, the weights, y. With gradients: x and dy twice, the weights twice, y, dx and the
    # weights' gradients.
    flops *= 3 if backward else 1
    bytes_ = (
        (6 if backward else 2) * tokens * n + (3 if backward else 1) * numbers
    ) * dtype.itemsize
    time = seconds["structmat"]
    best = min(seconds[name] for name in [*others, *(["fly"] if op == "monarch" else [])])
    return {
        "op": op,
        "tokens": tokens,
        "n": n,
        "blocks": blocks,
        "dtype": str(dtype).removeprefix("torch."),
        "passes": passes,
        "seconds": seconds,
        "ratio": best / time,
        "fly": seconds["fly"] / time if "fly" in seconds else None,
        "dense": seconds["dense"] / time if "dense" in seconds else None,
        "gflops": flops / time / 1e9,
        "gbytes": bytes_ / time / 1e9,
        "share_flops": flops / roofline.flops(dtype) / time,
        "share_bytes": bytes_ / roofline.bandwidth() / time,
        "share": roofline.floor(flops, bytes_, dtype) / time,
    }


def cell(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--passes", action="append", choices=["forward", "backward"])
    options.add_argument("--op", action="append", choices=["monarch", "block_diagonal"])
    options.add_argument("--tokens", action="append", type=int, help="only these (repeatable)")
    args = options.parse_args()
    start(args)
    keep_freed_memory()
    roofline = Roofline(args.device, args.tiny)
    rows, summary = [], []
    cases: list[tuple[Any, ...]] = [
        ("monarch", *case) for case in (TINY_MONARCH if args.tiny else MONARCH)
    ]
    cases += [
        ("block_diagonal", *case, None, None)
        for case in (TINY_BLOCK_DIAGONAL if args.tiny else BLOCK_DIAGONAL)
    ]
    for name in args.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        print(
            f"{name}: {roofline.flops(dtype) / 1e9:.0f} GFLOP/s, "
            f"{roofline.bandwidth() / 1e9:.0f} GB/s measured here"
        )
        for passes in args.passes or ["forward", "backward"]:
            print("forward" if passes == "forward" else "forward and backward")
            print(f"{'op':>14} {'tokens':>6} {'n':>5} {'blocks':>6} {'ours us':>9} {'torch us':>9} "
                  f"{'ratio':>6} {'goal':>5} {'fly':>6} {'dense':>6} {'GFLOP/s':>8} {'GB/s':>5} "
                  f"{'GEMM':>6} {'memory':>6}")  # fmt: skip
            found = []
            for op, tokens, n, blocks, *goals in cases:
                if (args.tokens and tokens not in args.tokens) or (args.op and op not in args.op):
                    continue
                r = row(op, tokens, n, blocks, dtype, passes, args, roofline)
                goal = goals[passes == "backward"]
                if op == "monarch" and dtype == torch.bfloat16 and not args.tiny:
                    goal = BFLOAT16_GOAL
                r["goal"] = goal
                found.append(r)
                ours = 1e6 * r["seconds"]["structmat"]
                print(f"{op:>14} {tokens:6} {n:5} {blocks:6} {ours:9.1f} {ours * r['ratio']:9.1f} "
                      f"{r['ratio']:6.2f} {cell(goal):>5} {cell(r['fly'], '.1f'):>6} "
                      f"{cell(r['dense'], '.1f'):>6} {r['gflops']:8.0f} {r['gbytes']:5.0f} "
                      f"{r['share_flops']:6.0%} {r['share_bytes']:6.0%}", flush=True)  # fmt: skip
            ratios = summarize_ratios(found)
            mean, least = ratios["geometric_mean"], ratios["least"]
            print(f"geometric mean {mean:.2f}, least {least:.2f}")
            summary.append({"dtype": name, "passes": passes, **ratios})
            rows += found
    write(args, "monarch", rows, summary=summary)


if __name__ == "__main__":
    main()
