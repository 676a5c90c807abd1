# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.svd_out_of_core against merely reading the file and scikit-learn's IncrementalPCA, and
randomized_svd of a CSR tensor against scikit-learn's and SciPy's.

python bench/bench_out_of_core.py [--tiny] [--json FILE] [--folder DIR]
float32, singular values near i^-1/2. seconds: best of the runs made, contenders alternating. cold:
the file was dropped from the page cache before; warm: it is in it. over reading: our time over two
readings of the file, block by block, into one buffer. excess: the relative Frobenius error over the
best of this rank, minus 1. share: the time of the measured roofline over ours.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Roofline, parser, start, write

import structmat as sm

FILES = [(100_000, 1000, 32, 2), (300_000, 1000, 8, 2)]  # rows, columns, rank, runs
SPARSE = [(200_000, 20_000, 2_000_000, 32, 2)]  # rows, columns, non-zeros, rank, runs
TINY = [(300, 40, 4, 1)], [(300, 200, 2000, 4, 1)]
BLOCK = 4096


def file(m: int, n: int, folder: str) -> tuple[Path, torch.Tensor]:
    """Gaussian rows times a decaying basis, and ``A^T A`` in float64."""
    path = Path(folder) / "A.npy"
    basis = torch.linalg.qr(torch.randn(n, n)).Q * torch.arange(1, n + 1)[:, None] ** -0.5
    array = np.lib.format.open_memmap(path, "w+", np.float32, (m, n))
    moments = torch.zeros(n, n, dtype=torch.float64)
    for first in range(0, m, 8192):
        rows = torch.randn(min(8192, m - first), n) @ basis
        array[first : first + len(rows)] = rows.numpy()
        moments += (rows.mT @ rows).double()
    array.flush()
    return path, moments


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read(path: Path, n: int) -> None:
    buffer = bytearray(BLOCK * n * 4)
    with open(path, "rb", buffering=0) as source:
        while source.readinto(buffer):
            pass


def incremental(path: Path, k: int) -> torch.Tensor:
    from sklearn.decomposition import IncrementalPCA

    A = np.load(path, mmap_mode="r")
    pca = IncrementalPCA(k)
    for first in range(0, len(A), BLOCK):
        if len(A) - first >= k:
            pca.partial_fit(A[first : first + BLOCK])
    return torch.from_numpy(pca.components_)


def excess_of(Vh: torch.Tensor, moments: torch.Tensor) -> float:
    values = torch.linalg.eigvalsh(moments)
    V = Vh.double()
    left = moments.trace() - ((V @ moments) * V).sum()
    return float((left / values[: -len(V)].sum()).sqrt()) - 1


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    time.sleep(0.1)  # threads of the one before spin
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def dense_row(m: int, n: int, k: int, runs: int, folder: str, roofline: Any) -> dict[str, Any]:
    path, moments = file(m, n, folder)
    best: dict[str, float] = {}
    excess: dict[str, float] = {}

    def run(name: str, call: Callable[[], Any], cold: bool = False) -> Any:
        if cold:
            drop(path)
        seconds, found = timed(call)
        best[name] = min(best.get(name, float("inf")), seconds)
        return found

    for turn in range(runs):
        for cold in (True, False):
            kind = "cold" if cold else "warm"

            def twice(cold: bool = cold) -> None:
                read(path, n)
                if cold:
                    drop(path)
                read(path, n)

            run(f"read twice, {kind}", twice, cold)
            result = run(f"structmat, {kind}", lambda: sm.linalg.svd_out_of_core(path, k), cold)
            excess["structmat"] = excess_of(result.Vh, moments)
        if turn == 0 and m * n <= 10**8 and find_spec("sklearn"):  # it takes long
            found = run("scikit-learn IncrementalPCA, warm", lambda: incremental(path, k))
            excess["scikit-learn IncrementalPCA"] = excess_of(found, moments)
    path.unlink()
    width = k + -(-(k + 8) // 16) * 16 - k
    flops, bytes_ = 8 * m * n * width, 8 * m * n
    floor = roofline.floor(flops, bytes_, torch.float32)
    over = {c: best[f"structmat, {c}"] / best[f"read twice, {c}"] for c in ("cold", "warm")}
    return {
        "rows": m, "n": n, "rank": k, "flops": flops, "bytes": bytes_, "seconds": best,
        "over reading": over,
        "excess": excess, "floor": floor, "share": floor / best["structmat, warm"],
    }  # fmt: skip


def sparse_row(m: int, n: int, nonzeros: int, k: int, runs: int) -> dict[str, Any]:
    rows = torch.randint(m, (nonzeros,))
    cols = (torch.rand(nonzeros).square() * n).long()  # some columns are much fuller than others
    A = torch.sparse_coo_tensor(torch.stack([rows, cols]), torch.rand(nonzeros), (m, n))
    A = A.coalesce().to_sparse_csr()
    contenders = {"structmat": lambda: sm.linalg.randomized_svd(A, k)}
    try:
        import scipy.sparse
        from scipy.sparse.linalg import svds
        from sklearn.utils.extmath import randomized_svd

        S = scipy.sparse.csr_matrix(
            (A.values().numpy(), A.col_indices().int().numpy(), A.crow_indices().int().numpy()),
            (m, n),
        )
        contenders["scikit-learn"] = lambda: randomized_svd(S, k, random_state=0)
        contenders["scipy svds"] = lambda: svds(S, k)
    except ImportError:
        pass
    best = dict.fromkeys(contenders, float("inf"))
    captured = {}
    for _ in range(runs):
        for name, call in contenders.items():
            seconds, found = timed(call)
            best[name] = min(best[name], seconds)
            V = torch.as_tensor(np.ascontiguousarray(found[2]))
            captured[name] = float((A @ V.mT.contiguous()).double().square().sum())
    total = float(A.values().double().square().sum())
    errors = {name: ((total - c) / total) ** 0.5 for name, c in captured.items()}
    least = min(errors.values())  # nobody computes all values of a matrix of this size
    return {
        "rows": m, "n": n, "nonzeros": A.values().numel(), "rank": k, "seconds": best,
        "ratio": {name: s / best["structmat"] for name, s in best.items()},
        "excess over the best here": {name: e / least - 1 for name, e in errors.items()},
    }  # fmt: skip


def shown(row: dict[str, Any]) -> dict[str, Any]:
    print(", ".join(f"{name} {row[name]:,}" for name in ("rows", "n", "rank")))
    for name, seconds in row["seconds"].items():
        print(f"  {name:34} {seconds:8.3f} s")
    for name, value in row.items():
        if isinstance(value, dict) and name != "seconds":
            print(f"  {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in value.items()), flush=True)
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", help="where the file goes (default: a temporary folder)")
    args = options.parse_args()
    if args.device != "cpu":
        raise SystemExit("bench_out_of_core.py measures the CPU")
    start(args)
    warnings.filterwarnings("ignore", message="Sparse")
    roofline = Roofline(args.device, args.tiny)
    files, sparse = TINY if args.tiny else (FILES, SPARSE)
    found = [shown(sparse_row(*size)) for size in sparse]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found += [shown(dense_row(*size, folder, roofline)) for size in files]
    write(args, "out_of_core", found)


if __name__ == "__main__":
    main()
