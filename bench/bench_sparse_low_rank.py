# SPDX-License-Identifier: Apache-2.0
"""sm.ops.sparse_low_rank_linear and sampled_matmul against what torch offers.

python bench/bench_sparse_low_rank.py [--device cuda] [--tiny] [--tokens N] [--passes NAME] ...
python bench/bench_sparse_low_rank.py --families      1,024 tokens, as one table of all families
torch: the fastest way to the same answer in torch. Forward: S as CSR times x^T plus two products, x
times the transposed CSR tensor, W made anew in each call (as SLTrain is published); for `columns`
the gathered numbers of x times a dense matrix; for `vector16` and `block16` these gathered strip by
strip for one batched product, for blocks BSR too. Forward and backward: autograd of these. Sampled:
sampled_addmm, or the products of the gathered numbers.
hand: forward and backward with gradients written out by hand instead, with a transposed S made
beforehand. dense: a linear layer whose W lies there, or for the passes `sampled` the dense dy^T x
of which the support is gathered. Each is their time over ours. goal: what is wanted of torch/dense.
share: the time of the measured roofline (products of large matrices, bandwidth) over ours. ~: ways
whose first two calls both took twice the fastest first call, and 50 ms; not run again.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Roofline, check, measure, parser, seconds_cpu, start, summarize_ratios, write
from torch.nn.functional import linear

import structmat as sm

FAMILIES = ("uniform", "columns", "vector16", "block16")
DENSITIES = (0.01, 0.03, 0.1)
TOKENS = (1, 16, 1024)
PASSES = ("forward", "backward", "sampled")
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
Run = Callable[[], list[Any]]


class Case:
    """Operands of one layer and each way to compute with them."""

    def __init__(
        self, tokens: int, density: float, family: str, dtype: torch.dtype, args: Any
    ) -> None:
        m, n, r = TINY if args.tiny else SIZES
        self.m, self.n, self.r = m, n, r
        self.family, self.device = family, args.device

        def draw(*shape: int, scale: float = 1) -> Any:
            return (torch.randn(*shape, device=args.device) * scale).to(dtype)

        self.pattern = sm.SparsePattern.random(m, n, density, family=family).to(args.device)
        per_row = max(self.pattern.nnz / m, 1)
        self.x, self.dy, self.bias = draw(tokens, n), draw(tokens, m), draw(m)
        self.U, self.V = draw(m, r, scale=r**-0.5), draw(r, n, scale=n**-0.5)
        self.values = draw(self.pattern.nnz, scale=per_row**-0.5)
        self.csr = self.pattern.to_csr(self.values)
        self.zeros = self.pattern.to_csr(torch.zeros_like(self.values))
        _, row, column = self.pattern.coordinates()
        self.flat = row * n + column
        self.indices = torch.stack([row, column])
        self.transposed = self.csr.to_dense().t().to_sparse_csr()
        self.W = self.whole(self.U, self.V, self.values)
        if family == "columns":
            self.columns = column[: self.pattern.nnz // m]
        if family in ("vector16", "block16"):
            self.set_strips(row, column)

    def set_strips(self, row: Any, column: Any) -> None:
        """16 rows share their columns: (m / 16, k) of these, short strips filled up with zeros."""
        per_row = self.csr.crow_indices().diff()
        k = int(per_row.max())
        place = torch.arange(len(row), device=row.device) - self.csr.crow_indices()[row]
        self.slot = row * k + place
        self.strips = self.values.new_zeros(self.m * k).scatter(0, self.slot, self.values)
        self.strips = self.strips.view(self.m // 16, 16, k)
        columns = column.new_zeros(self.m * k).scatter(0, self.slot, column)
        self.strip_columns = columns.view(self.m // 16, 16, k)[:, 0].flatten()

    # ---- In torch, forward ------------------------------------------------------------------

    def whole(self, U: Any, V: Any, values: Any) -> Any:
        W = U @ V
        W.view(-1).scatter_add_(0, self.flat, values)
        return W

    def gathered(self, x: Any) -> Any:
        """The numbers of x each strip takes: (m / 16, k, T)."""
        return x.T.contiguous()[self.strip_columns].view(self.m // 16, -1, x.shape[0])

    def products(self) -> dict[str, tuple[Any, Callable[[Any, Any], Any]]]:
        """What holds the values, and x S^T from it."""
        found: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {}
        if self.x.dtype in (torch.float32, torch.float64):
            found["csr @ xT"] = self.csr, lambda x, S: torch.sparse.mm(S, x.T.contiguous()).T
            found["x @ csrT"] = self.csr, lambda x, S: x @ S.t()
        if self.family == "columns":
            found["gathered"] = (
                self.values.view(self.m, -1),
                lambda x, S: x.index_select(1, self.columns) @ S.T,
            )
        if self.family in ("vector16", "block16"):
            found["strips"] = self.strips, lambda x, S: (S @ self.gathered(x)).view(self.m, -1).T
        return found

    def forward(self) -> dict[str, Run]:
        found: dict[str, Run] = {
            "materialised": lambda: [
                linear(self.x, self.whole(self.U, self.V, self.values), self.bias)
            ]
        }
        products = self.products()
        if self.family == "block16" and "csr @ xT" in products:
            bsr = self.csr.to_dense().to_sparse_bsr((16, 16))
            products["bsr @ xT"] = bsr, lambda x, S: (S @ x.T.contiguous()).T
        for name, (S, product) in products.items():
            found[name] = lambda S=S, product=product: [
                torch.addmm(product(self.x, S).add_(self.bias), self.x @ self.V.T, self.U.T)
            ]
        return found

    # ---- In torch, with gradients -----------------------------------------------------------

    def by_autograd(self) -> dict[str, Run]:
        def run(S: Any, compute: Callable[..., Any]) -> list[Any]:
            tensors = (self.x, self.U, self.V, S, self.bias)
            leaves = [a.detach().requires_grad_() for a in tensors]
            dx, dU, dV, dS, db = torch.autograd.grad(compute(*leaves), leaves, self.dy)
            return [dx, dU, dV, self.on_support(dS), db]

        products = self.products()
        if self.device == "cuda":  # torch's sparse tensors in graphs: not tried
            products = {k: p for k, p in products.items() if "csr" not in k}
        elif self.x.shape[0] == 1024 and self.family == "uniform" and "csr @ xT" in products:
            products["coo @ xT"] = self.values, lambda x, v: (self.coo(v) @ x.T.contiguous()).T
        found: dict[str, Run] = {
            "materialised": lambda: run(
                self.values, lambda x, U, V, values, b: linear(x, self.whole(U, V, values), b)
            )
        }
        for name, (S, product) in products.items():

            def compute(x: Any, U: Any, V: Any, S: Any, b: Any, product: Any = product) -> Any:
                return torch.addmm(product(x, S) + b, x @ V.T, U.T)

            found[name] = lambda S=S, compute=compute: run(S, compute)
        return {f"autograd: {name}": function for name, function in found.items()}

    def coo(self, values: Any) -> Any:
        return torch.sparse_coo_tensor(
            self.indices, values, (self.m, self.n), is_coalesced=True, check_invariants=False
        )

    def on_support(self, dS: Any) -> Any:
        if dS.layout == torch.sparse_csr:
            return dS.values()
        if dS.dim() == 3:
            return dS.view(-1)[self.slot]
        return dS.reshape(-1)[self.flat] if dS.shape == self.W.shape else dS.view(-1)

    def by_hand(self) -> dict[str, Run]:
        def factored(product: Callable[[], Any], gradients: Callable[[], Any]) -> list[Any]:
            h = self.x @ self.V.T
            torch.addmm(product().add_(self.bias), h, self.U.T)  # y
            dh = self.dy @ self.U
            dx, dvalues = gradients()
            dx = torch.addmm(dx, dh, self.V)
            return [dx, self.dy.T @ h, dh.T @ self.x, dvalues, self.dy.sum(0)]

        def materialised() -> list[Any]:
            W = self.whole(self.U, self.V, self.values)
            linear(self.x, W, self.bias)
            dW = self.dy.T @ self.x
            dvalues = dW.view(-1)[self.flat]
            return [self.dy @ W, dW @ self.V.T, self.U.T @ dW, dvalues, self.dy.sum(0)]

        gradients = {"csr @ xT": self.sampled_addmm, "strips": self.sampled_strips}
        found: dict[str, Run] = {"materialised": materialised}
        for name, (S, product) in self.products().items():
            # On a CPU torch has no CSR product in 16 bits.
            if name in gradients and (self.x.is_cuda or self.x.dtype == torch.float32):
                found[name] = lambda S=S, product=product, sampled=gradients[name]: factored(
                    lambda: product(self.x, S),
                    lambda: ((self.transposed @ self.dy.T.contiguous()).T, sampled()[0]),
                )
            if name == "gathered":

                def gathered() -> Any:
                    dx = torch.zeros_like(self.x)
                    dx[:, self.columns] = self.dy @ self.values.view(self.m, -1)
                    return dx, self.sampled_columns()[0]

                found[name] = lambda S=S, product=product: factored(
                    lambda: product(self.x, S), gathered
                )
        return {f"hand: {name}": function for name, function in found.items()}

    def sampled(self) -> dict[str, Run]:
        found = {}
        if self.x.dtype in (torch.float32, torch.float64):
            found["sampled_addmm"] = self.sampled_addmm
        if self.family == "columns":
            found["gathered"] = self.sampled_columns
        if self.family in ("vector16", "block16"):
            found["strips"] = self.sampled_strips
        return found

    def sampled_addmm(self) -> list[Any]:
        return [torch.sparse.sampled_addmm(self.zeros, self.dy.T, self.x, beta=0.0).values()]

    def sampled_columns(self) -> list[Any]:
        return [(self.dy.T @ self.x.index_select(1, self.columns)).view(-1)]

    def sampled_strips(self) -> list[Any]:
        dy = self.dy.T.contiguous().view(self.m // 16, 16, -1)
        return [(dy @ self.gathered(self.x).transpose(1, 2)).view(-1)[self.slot]]

    # ---- Dense, ours, exact -----------------------------------------------------------------

    def dense(self, passes: str) -> list[Any]:
        if passes == "sampled":
            return [(self.dy.T @ self.x).view(-1)[self.flat]]
        y = linear(self.x, self.W, self.bias)
        if passes == "forward":
            return [y]
        return [self.dy @ self.W, self.dy.T @ self.x, self.dy.sum(0)]

    def ours(self, passes: str) -> list[Any]:
        if passes == "sampled":
            return [sm.ops.sampled_matmul(self.dy, self.x, self.pattern)]
        leaves = [self.x, self.U, self.V, self.values, self.bias]
        if passes == "backward":
            leaves = [a.detach().requires_grad_() for a in leaves]
        x, U, V, values, bias = leaves
        y = sm.ops.sparse_low_rank_linear(x, U, V, self.pattern, values, bias)
        return [y] if passes == "forward" else list(torch.autograd.grad(y, leaves, self.dy))

    def exact(self, passes: str) -> tuple[list[Any], list[Any]]:
        """The answers of the layer and of the dense one."""
        U, V, x, dy, b = (a.double() for a in (self.U, self.V, self.x, self.dy, self.bias))
        if passes == "sampled":
            values = (dy.T @ x).view(-1)[self.flat]
            return [values], [values]
        W = self.whole(U, V, self.values.double())
        if passes == "forward":
            y = torch.addmm(b, x, W.T)
            return [y], [y]
        dx, dW, db = dy @ W, dy.T @ x, dy.sum(0)
        return [dx, dW @ V.T, U.T @ dW, dW.view(-1)[self.flat], db], [dx, dW, db]


def row(case: Case, passes: str, args: Any, roofline: Roofline) -> dict[str, Any]:
    groups: dict[str, dict[str, Run]] = {"ours": {"structmat": lambda: case.ours(passes)}}
    if passes == "sampled":
        groups["torch"] = case.sampled()
    elif passes == "forward":
        groups["torch"] = case.forward()
    else:
        groups |= {"torch": case.by_autograd(), "hand": case.by_hand()}
    run, large, seconds = {}, {"dense": lambda: case.dense(passes)}, {}
    exact, exact_dense = case.exact(passes)
    check(large, exact_dense, DTYPES[args.dtype])
    for group in groups.values():
        first = check(group, exact, DTYPES[args.dtype])
        slow = max(0.05, 2 * min(first.values(), default=0))
        for name, contender in group.items():
            if args.device == "cpu" and first[name] > slow:
                best = min(first[name], seconds_cpu(contender))  # the first call was a cold one
                if best > slow:
                    seconds[name] = best
                    continue
            (large if "materialised" in name else run)[name] = contender
    dropped = list(seconds)
    del exact, exact_dense
    with torch.no_grad() if passes != "backward" else torch.enable_grad():
        # Apart from the others: a dense weight drives theirs out of the caches.
        seconds |= measure(run, args.device, tiny=args.tiny)
        seconds |= measure(large, args.device, budget=0.3, tiny=args.tiny, least=2)
    ours = seconds["structmat"]

    def ratio(group: str) -> float | None:
        found = groups.get(group)
        return min(seconds[name] for name in found) / ours if found else None

    tokens, nnz = case.x.shape[0], case.pattern.nnz
    factors = 0 if passes == "sampled" else case.r * (case.m + case.n)
    # With gradients: operands twice, dy, and the gradients.
    numbers = tokens * (case.m + case.n) + nnz + factors
    times = 3 if passes == "backward" else 1
    flops, bytes_ = 2 * tokens * (nnz + factors) * times, numbers * times * case.x.element_size()
    dense, torch_way = seconds["dense"] / ours, ratio("torch")
    return {
        "tokens": tokens,
        "family": case.family,
        "dtype": args.dtype,
        "passes": passes,
        "seconds": seconds,
        "dropped": dropped,
        # In 16 bits torch has no `sampled` for any support: what it has then is the dense one.
        "ratio": dense if torch_way is None else torch_way,
        "hand": ratio("hand"),
        "dense": dense,
        "gflops": flops / ours / 1e9,
        "share": roofline.floor(flops, bytes_, case.x.dtype) / ours,
    }


def show(r: dict[str, Any]) -> None:
    wanted = r["family"] == "uniform" and r["density"] == 0.03
    goal = GOALS.get((r["passes"], r["tokens"]), (None,)) if wanted else (None,)
    goals = "/".join(f"{g:g}" for g in goal if g is not None)
    times = {k: 1e6 * t for k, t in r["seconds"].items()}
    ours = times.pop("structmat")
    rest = ", ".join(f"{k} {'~' * (k in r['dropped'])}{t:.0f}" for k, t in times.items())
    hand = f"{r['hand']:.2f}" if r["hand"] else ""
    print(f"{r['passes']:>8} {r['tokens']:6} {r['density']:7} {r['family']:>8} {ours:9.1f} "
          f"{r['ratio']:6.2f} {hand:>6} {r['dense']:6.2f} {goals:>8} {r['gflops']:8.0f} "
          f"{r['share']:6.2f}  {rest}", flush=True)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> None:
    """One line a density and family, in Markdown."""
    print("\n| density | family | forward, ms | torch | dense | forward and backward, ms | torch, "
          "autograd | torch, by hand | dense | sampled, ms | torch | dense |")  # fmt: skip
    print("|" + "---|" * 12)
    for density, family in dict.fromkeys((r["density"], r["family"]) for r in rows):
        cells = [f"{100 * density:g} %", f"`{family}`"]
        for r in rows:
            if (r["density"], r["family"]) == (density, family):
                ratios = [r["ratio"], r["hand"], r["dense"]]
                cells.append(f"{1e3 * r['seconds']['structmat']:.1f}")
                cells += [f"{ratio:.1f}" for ratio in ratios if ratio is not None]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dtype", choices=list(DTYPES), default="float32")
    options.add_argument("--passes", action="append", choices=PASSES)
    options.add_argument("--tokens", action="append", type=int, help="only these (repeatable)")
    options.add_argument("--density", action="append", type=float, help="only these (repeatable)")
    options.add_argument("--family", action="append", choices=FAMILIES)
    options.add_argument("--families", action="store_true", help="a table for 1,024 tokens")
    args = options.parse_args()
    start(args)
    roofline = Roofline(args.device, args.tiny)
    if args.families:
        args.tokens = args.tokens or [1024]
    print(f"{'':8} {'tokens':>6} {'density':>7} {'family':>8} {'ours us':>9} {'torch':>6} "
          f"{'hand':>6} {'dense':>6} {'goal':>8} {'GFLOP/s':>8} {'share':>6}  "
          "others us")  # fmt: skip
    rows = []
    for tokens in args.tokens or ((1, 20) if args.tiny else TOKENS):
        for density in args.density or ((0.1,) if args.tiny else DENSITIES):
            for family in args.family or FAMILIES:
                case = Case(tokens, density, family, getattr(torch, args.dtype), args)
                for passes in args.passes or PASSES:
                    rows.append({"density": density} | row(case, passes, args, roofline))
                    show(rows[-1])
    for passes in args.passes or PASSES:
        ratios = summarize_ratios(r for r in rows if r["passes"] == passes)
        mean, least = ratios["geometric_mean"], ratios["least"]
        print(f"{passes:>8} geometric mean {mean:.2f}, least {least:.2f}")
    if args.families:
        table(rows)
    write(args, "sparse_low_rank", rows)


if __name__ == "__main__":
    main()
