# SPDX-License-Identifier: Apache-2.0
"""sm.ops.sparse_low_rank_linear and sampled_matmul against what torch offers.

python bench/bench_sparse_low_rank.py [--device cuda] [--tiny] [--tokens N] [--passes NAME] ...
Contenders: S as a CSR tensor times a contiguous x^T plus two products, x times the transposed CSR
tensor, the dense W made anew in each call (as SLTrain is published), and for the family `columns`
the gathered numbers of x times a dense matrix. Gradients of the first are written out by hand, with
sampled_addmm and a transpose made beforehand, which is faster than autograd. ratio: the fastest of
these over ours; dense: a linear layer whose W lies there, or for the passes `sampled` the dense
dy^T x of which the support is gathered, over ours. goal: what is wanted of both. share: the time of
the measured roofline (products of large matrices, bandwidth) over ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Roofline, check, measure, parser, start, summarize_ratios, write

import structmat as sm

FAMILIES = ("uniform", "columns", "vector16", "block16")
TOKENS = (1, 16, 1024)
SIZES = (4096, 4096, 128)
TINY = (48, 32, 4)
DTYPES = {"float32": 1e-5, "bfloat16": 2e-2}
GOALS: dict[tuple[str, int], tuple[float, float | None]] = {  # uniform, 3 %
    ("forward", 1): (2, None),
    ("forward", 16): (1.7, None),
    ("forward", 1024): (2, 6),
    ("backward", 1024): (3, 5),
    ("sampled", 1024): (2.5, 10),
}


class Case:
    """Operands of one layer and each way to compute with them."""

    def __init__(
        self, tokens: int, density: float, family: str, dtype: torch.dtype, args: Any
    ) -> None:
        m, n, r = TINY if args.tiny else SIZES
        self.m, self.n, self.r = m, n, r

        def draw(*shape: int, scale: float = 1) -> Any:
            return (torch.randn(*shape, device=args.device) * scale).to(dtype)

        self.pattern = sm.SparsePattern.random(m, n, density, family=family).to(args.device)
        per_row = max(self.pattern.nnz / m, 1)
        self.x, self.dy, self.bias = draw(tokens, n), draw(tokens, m), draw(m)
        self.U, self.V = draw(m, r, scale=r**-0.5), draw(r, n, scale=n**-0.5)
        self.values = draw(self.pattern.nnz, scale=per_row**-0.5)
        self.csr = self.pattern.to_csr(self.values)
        self.zeros = self.pattern.to_csr(torch.zeros_like(self.values))
        self.csc = self.csr.t()
        self.transposed = self.csr.to_dense().t().to_sparse_csr()
        _, row, column = self.pattern.coordinates()
        self.flat = row * n + column
        self.columns = column[: self.pattern.nnz // m] if family == "columns" else None
        self.W = self.whole()

    def ours(self, backward: bool) -> list[Any]:
        leaves = [self.x, self.U, self.V, self.values, self.bias]
        if not backward:
            x, U, V, values, bias = leaves
            return [sm.ops.sparse_low_rank_linear(x, U, V, self.pattern, values, bias)]
        x, U, V, values, bias = leaves = [a.detach().requires_grad_() for a in leaves]
        y = sm.ops.sparse_low_rank_linear(x, U, V, self.pattern, values, bias)
        return list(torch.autograd.grad(y, leaves, self.dy))

    def factored(self, product: Callable[[], Any], gradients: Callable[[], Any]) -> Any:
        """y = x S^T + (x V^T) U^T + b; `product` is x S^T, `gradients` are dy S and dvalues."""

        def run(backward: bool) -> list[Any]:
            h = self.x @ self.V.T
            y = torch.addmm(product().add_(self.bias), h, self.U.T)
            if not backward:
                return [y]
            dx, dvalues = gradients()
            dh = self.dy @ self.U
            dx = torch.addmm(dx, dh, self.V)
            return [dx, self.dy.T @ h, dh.T @ self.x, dvalues, self.dy.sum(0)]

        return run

    def csr_gradients(self) -> Any:
        return (self.transposed @ self.dy.T.contiguous()).T, self.sampled_addmm()[0]

    def sampled_addmm(self) -> list[Any]:
        return [torch.sparse.sampled_addmm(self.zeros, self.dy.T, self.x, beta=0.0).values()]

    def gathered_gradients(self) -> Any:
        dx = torch.zeros_like(self.x)
        dx[:, self.columns] = self.dy @ self.values.view(self.m, -1)
        return dx, (self.dy.T @ self.x.index_select(1, self.columns)).view(-1)

    def whole(self) -> Any:
        W = self.U @ self.V
        W.view(-1).scatter_add_(0, self.flat, self.values)
        return W

    def materialised(self, backward: bool) -> list[Any]:
        W = self.whole()
        y = torch.addmm(self.bias, self.x, W.T)
        return self.dense_gradients(W) if backward else [y]

    def dense_gradients(self, W: Any) -> list[Any]:
        dW = self.dy.T @ self.x
        dvalues = dW.view(-1).gather(0, self.flat)
        return [self.dy @ W, dW @ self.V.T, self.U.T @ dW, dvalues, self.dy.sum(0)]

    def dense(self, backward: bool) -> list[Any]:
        y = torch.addmm(self.bias, self.x, self.W.T)
        if not backward:
            return [y]
        return [self.dy @ self.W, self.dy.T @ self.x, self.dy.sum(0)]

    def compositions(self) -> dict[str, Any]:
        found = {"materialised": self.materialised}
        if self.x.dtype in (torch.float32, torch.float64):
            found["csr @ xT"] = self.factored(
                lambda: (self.csr @ self.x.T.contiguous()).T, self.csr_gradients
            )
            found["x @ csrT"] = self.factored(lambda: self.x @ self.csc, self.csr_gradients)
        if self.columns is not None:
            found["gathered"] = self.factored(
                lambda: self.x.index_select(1, self.columns) @ self.values.view(self.m, -1).T,
                self.gathered_gradients,
            )
        return found

    def exact(self, backward: bool) -> list[Any]:
        U, V, x, dy, b = (a.double() for a in (self.U, self.V, self.x, self.dy, self.bias))
        W = U @ V
        W.view(-1).scatter_add_(0, self.flat, self.values.double())
        if not backward:
            return [torch.addmm(b, x, W.T)]
        dW = dy.T @ x
        return [dy @ W, dW @ V.T, U.T @ dW, dW.view(-1).gather(0, self.flat), dy.sum(0)]


def row(
    tokens: int, density: float, family: str, name: str, passes: str, args: Any, roofline: Roofline
) -> dict[str, Any]:
    dtype, tolerance = getattr(torch, name), DTYPES[name]
    case = Case(tokens, density, family, dtype, args)
    backward = passes == "backward"
    nnz, m, n, r = case.pattern.nnz, case.m, case.n, case.r
    if passes == "sampled":
        contenders: dict[str, Any] = {
            "structmat": lambda: [sm.ops.sampled_matmul(case.dy, case.x, case.pattern)]
        }
        if dtype == torch.float32:
            contenders["sampled_addmm"] = case.sampled_addmm
        if case.columns is not None:
            contenders["gathered"] = lambda: [case.gathered_gradients()[1]]
        dense = {"dense": lambda: (case.dy.T @ case.x).view(-1).gather(0, case.flat)}
        exact = [(case.dy.double().T @ case.x.double()).view(-1)[case.flat]]
        flops, numbers = 2 * tokens * nnz, tokens * (m + n) + nnz
    else:
        contenders = {"structmat": lambda: case.ours(backward)}
        for key, function in case.compositions().items():
            contenders[key] = lambda function=function: function(backward)
        dense = {"dense": lambda: case.dense(backward)}
        exact = case.exact(backward)
        flops = 2 * tokens * (nnz + r * (m + n)) * (3 if backward else 1)
        # With gradients: operands twice, dy, and the gradients.
        numbers = (3 if backward else 1) * (tokens * (m + n) + nnz + r * (m + n))
    check(contenders, exact, tolerance)
    del exact
    with torch.no_grad() if not backward else torch.enable_grad():
        # Apart from the others: a dense weight drives theirs out of the caches.
        large = {k: contenders.pop(k) for k in ("materialised",) if k in contenders} | dense
        seconds = measure(contenders, args.device, tiny=args.tiny)
        seconds |= measure(large, args.device, budget=0.3, tiny=args.tiny, least=3)
    ours = seconds["structmat"]
    others = [t for key, t in seconds.items() if key not in ("structmat", "dense")]
    bytes_ = numbers * dtype.itemsize
    return {
        "tokens": tokens,
        "density": density,
        "family": family,
        "dtype": name,
        "passes": passes,
        "seconds": seconds,
        "ratio": min(others or [seconds["dense"]]) / ours,
        "dense": seconds["dense"] / ours,
        "gflops": flops / ours / 1e9,
        "share": roofline.floor(flops, bytes_, dtype) / ours,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=list(DTYPES), default="float32")
    options.add_argument("--passes", action="append", choices=["forward", "backward", "sampled"])
    options.add_argument("--tokens", action="append", type=int, help="only these (repeatable)")
    options.add_argument("--density", action="append", type=float, help="only these (repeatable)")
    options.add_argument("--family", action="append", choices=FAMILIES)
    args = options.parse_args()
    start(args)
    roofline = Roofline(args.device, args.tiny)
    rows = []
    for passes in args.passes or ["forward", "backward", "sampled"]:
        print(f"{passes:>10} {'tokens':>6} {'density':>7} {'family':>8} {'ours us':>9} "
              f"{'ratio':>6} {'dense':>6} {'goal':>8} {'GFLOP/s':>8} "
              f"{'share':>6}  others us")  # fmt: skip
        found = []
        for tokens in args.tokens or ((1, 20) if args.tiny else TOKENS):
            for density in args.density or (0.01, 0.03, 0.1):
                for family in args.family or FAMILIES:
                    r = row(tokens, density, family, args.dtype, passes, args, roofline)
                    found.append(r)
                    wanted = family == "uniform" and density == 0.03
                    goal = GOALS.get((passes, tokens), (None, None)) if wanted else (None, None)
                    goals = "/".join(f"{g:g}" for g in goal if g is not None)
                    times = {k: 1e6 * t for k, t in r["seconds"].items()}
                    rest = ", ".join(f"{k} {t:.0f}" for k, t in times.items() if k != "structmat")
                    print(f"{'':10} {tokens:6} {density:7} {family:>8} {times['structmat']:9.1f} "
                          f"{r['ratio']:6.2f} {r['dense']:6.2f} {goals:>8} {r['gflops']:8.0f} "
                          f"{r['share']:6.2f}  {rest}", flush=True)  # fmt: skip
        ratios = summarize_ratios(found)
        mean, least = ratios["geometric_mean"], ratios["least"]
        print(f"{'':10} geometric mean {mean:.2f}, least {least:.2f}")
        rows += found
    write(args, "sparse_low_rank", rows)


if __name__ == "__main__":
    main()
