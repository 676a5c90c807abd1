# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.orthonormalize, gram_matmul, range_step and svd_tail against torch.

python bench/bench_linalg.py [--device cuda] [--tiny] [--accuracy] [--json FILE]
orthonormalize against torch.linalg.qr; gram_matmul against A.T @ (A @ X); range_step against the
same step with torch.linalg.qr; svd_tail against torch.linalg.svd. ratio: their time over ours.
share: the time of the measured roofline, over ours: FLOPs at float64's rate for orthonormalize,
A read once for gram_matmul. --accuracy: loss of orthogonality and of span of ill-conditioned
columns instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Roofline, check, measure, parser, start, synchronize, write

import structmat as sm

ORTH = [(50_000, 64), (4096, 144), (2048, 64), (16_384, 256)]
GRAM = [(16_384, 1024), (4096, 4096)]
WIDTHS = [1, 8, 64]
STEP = [(4096, 4096, 128), (2048, 2048, 64)]
LAYERS = 4 * (4 * [(768, 768)] + [(3072, 768), (768, 3072)])
TAIL = [(1024, 1024, 32)]
Case = tuple[str, dict[str, Callable[[], Any]], float, float, torch.dtype]


def orth_cases(args: Any) -> list[Case]:
    found = []
    for m, l in [(60, 8)] if args.tiny else ORTH:
        for dtype in (torch.float32, torch.float64):
            Y = torch.randn(m, l, device=args.device).to(dtype)
            both = {
                "structmat": lambda Y=Y: sm.linalg.orthonormalize(Y),
                "torch": lambda Y=Y: torch.linalg.qr(Y).Q,
            }
            reference = torch.linalg.qr(Y.double())
            want = reference.Q * reference.R.diagonal().sign()
            check({"structmat": both["structmat"]}, want, 1e-5)
            bytes_ = 3.0 * m * l * Y.element_size()
            name = f"orthonormalize {m} x {l} {str(dtype)[6:]}"
            found.append((name, both, 2.0 * m * l * l, bytes_, torch.float64))
    return found


def gram_cases(args: Any) -> list[Case]:
    found = []
    for m, n in [(40, 30)] if args.tiny else GRAM:
        for dtype in (torch.float32, torch.bfloat16):
            A = (torch.randn(m, n, device=args.device) / n**0.5).to(dtype)
            for l in [3] if args.tiny else WIDTHS:
                X = torch.randn(n, l, device=args.device).to(dtype)
                both = {
                    "structmat": lambda A=A, X=X: sm.linalg.gram_matmul(A, X),
                    "torch": lambda A=A, X=X: A.T @ (A @ X),
                }
                want = A.double().T @ (A.double() @ X.double())
                check(both, want, 1e-5 if dtype == torch.float32 else 2e-2)
                name = f"gram_matmul {m} x {n} x {l} {str(dtype)[6:]}"
                bytes_ = float(m * n * A.element_size())
                found.append((name, both, 4.0 * m * n * l, bytes_, dtype))
    return found


def step_cases(args: Any) -> list[Case]:
    found = []
    for m, n, r in [(40, 30, 4)] if args.tiny else STEP:
        A = torch.randn(m, n, device=args.device)
        Q = sm.linalg.gaussian(n, r, device=args.device)

        def theirs(A: torch.Tensor = A, Q: torch.Tensor = Q) -> tuple[torch.Tensor, ...]:
            P = torch.linalg.qr(A @ Q).Q
            B = A.T @ P
            return P, torch.linalg.qr(B).Q, B

        both = {"structmat": lambda A=A, Q=Q: sm.linalg.range_step(A, Q), "torch": theirs}
        flops = 4.0 * m * n * r + 4.0 * (m + n) * r * r
        found.append((f"range_step {m} x {n}, {r}", both, flops, 8.0 * m * n, A.dtype))
    return [*found, step_of_layers(args)]


def step_of_layers(args: Any) -> Case:
    """A step for every layer of a small transformer in one call."""
    shapes, r = ([(40, 30), (30, 40)], 4) if args.tiny else (LAYERS, 64)
    A = [torch.randn(*shape, device=args.device) for shape in shapes]
    Q = [sm.linalg.gaussian(n, r, device=args.device) for _, n in shapes]

    def theirs() -> list[tuple[torch.Tensor, ...]]:
        found = []
        for a, q in zip(A, Q, strict=True):
            P = torch.linalg.qr(a @ q).Q
            B = a.T @ P
            found.append((P, torch.linalg.qr(B).Q, B))
        return found

    both = {"structmat": lambda: sm.linalg.range_step(A, Q), "torch": theirs}
    flops = sum(4.0 * m * n * r + 4.0 * (m + n) * r * r for m, n in shapes)
    bytes_ = sum(8.0 * m * n for m, n in shapes)
    return f"range_step of {len(shapes)} layers, {r}", both, flops, bytes_, A[0].dtype


def tail_cases(args: Any) -> list[Case]:
    found = []
    for m, n, k in [(60, 40, 3)] if args.tiny else TAIL:
        A = torch.randn(m, n, device=args.device)
        low = torch.linalg.qr(torch.randn(m, n, device=args.device)).Q
        falling = (low * torch.logspace(0, -3, n, device=args.device)) @ A[:n] / n**0.5
        slow = torch.linalg.svd(A, full_matrices=False)
        sigma = torch.arange(1, n + 1, device=args.device) ** -0.5
        cases = {"Gaussian": A, "falling": falling, "i^-1/2": slow.U * sigma @ slow.Vh}
        for name, matrix in cases.items():
            both = {
                "structmat": lambda A=matrix, k=k: sm.linalg.svd_tail(A, k),
                "torch": lambda A=matrix: torch.linalg.svd(A, full_matrices=False),
            }
            flops = 4.0 * m * n * n - 4.0 / 3 * n**3
            steps = sm.linalg.svd_tail(matrix, k).info.sweeps
            title = f"svd_tail {m} x {n}, {k}, {name} ({steps} steps)"
            found.append((title, both, flops, 4.0 * m * n, A.dtype))
    return found


def accuracy() -> None:
    """max |Q^T Q - I| and the largest share of a column outside the span of Q."""
    x, c = torch.linspace(-1, 1, 400).double()[:, None], torch.linspace(-1, 1, 60).double()
    i = torch.arange(1.0, 301, dtype=torch.float64)
    panels = {
        "radial basis functions": torch.exp(-2 * (x - c).square()),
        "Vandermonde": torch.linalg.vander(x[:, 0], N=40),
        "Hilbert": 1 / (i[:, None] + i[:40] - 1),
    }
    for decades in (4, 8, 12, 30):
        left, right = (torch.linalg.qr(torch.randn(s, 50).double()).Q for s in (500, 50))
        panels[f"condition 1e{decades}"] = (
            left * torch.logspace(0, -decades, 50, dtype=torch.float64)
        ) @ right.T
    print(f"{'':24} {'dtype':8} {'orthogonality':>21} {'span':>21}")
    for name, wide in panels.items():
        for dtype in (torch.float32, torch.float64):
            Y = wide.to(dtype)
            unit = Y.double() / Y.double().norm(dim=0)
            row = []
            for Q in (sm.linalg.orthonormalize(Y).double(), torch.linalg.qr(Y).Q.double()):
                loss = (Q.T @ Q - torch.eye(Q.shape[1])).abs().max().item()
                row.append((loss, (unit - Q @ (Q.T @ unit)).norm(dim=0).max().item()))
            (ours, ours_span), (torch_, torch_span) = row
            print(
                f"{name:24} {str(dtype)[6:]:8} {ours:10.1e} {torch_:10.1e} "
                f"{ours_span:10.1e} {torch_span:10.1e}"
            )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--accuracy", action="store_true")
    args = options.parse_args()
    start(args)
    if args.accuracy:
        return accuracy()
    roofline = Roofline(args.device, args.tiny)
    rows = []
    print(f"{'':52} {'ours ms':>9} {'torch ms':>9} {'ratio':>6} {'share':>6}")
    for name, both, flops, bytes_, dtype in (
        *orth_cases(args),
        *gram_cases(args),
        *step_cases(args),
        *tail_cases(args),
    ):
        waits = {
            key: lambda f=f: (f(), synchronize(args.device))[0] if args.device == "cpu" else f()
            for key, f in both.items()
        }
        if name.startswith("svd_tail") and args.device == "cuda":
            continue  # waits for the device, which a graph cannot hold
        times = measure(waits, args.device, tiny=args.tiny)
        ours, theirs = times["structmat"], times["torch"]
        share = roofline.floor(flops, bytes_, dtype) / ours
        ratio = theirs / ours
        print(f"{name:52} {1e3 * ours:9.2f} {1e3 * theirs:9.2f} {ratio:6.2f} {share:6.2f}")
        rows.append({"name": name, "seconds": times, "ratio": ratio, "share": share})
    write(args, "linalg", rows)


if __name__ == "__main__":
    main()
