# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.svd_out_of_core against merely reading the file and scikit-learn's IncrementalPCA, and
randomized_svd of a CSR tensor against scikit-learn's and SciPy's.

python bench/bench_out_of_core.py [--tiny] [--cold] [--json FILE] [--folder DIR]
float32, singular values near i^-1/2. seconds: best of the runs made, contenders alternating. read:
as many readings of the file by the same reader, the blocks left alone. over reading: our time over
that. With --cold, and files of 4 GB, the file is dropped from the page cache before every reading,
the second of a contender too; else it is in it. excess: the relative Frobenius error over the best
of this rank, minus 1. share: the time of the measured roofline over ours.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Roofline, parser, start, write

import structmat as sm
from structmat.linalg.row_blocks import MatrixFile

FILES = [(100_000, 1000, 8, 3), (100_000, 1000, 32, 3), (100_000, 1000, 64, 3)]
COLD = [(1_000_000, 1000, 8, 2), (1_000_000, 1000, 32, 2), (1_000_000, 1000, 64, 2)]
SPARSE = [(200_000, 20_000, 2_000_000, 32, 2)]  # rows, columns, non-zeros, rank, runs
TINY = [(300, 40, 4, 1)], [(300, 200, 2000, 4, 1)]  # rows, columns, rank, runs
BLOCK, PATTERN, SWEEPS = 4096, 20_000, 2


def file(m: int, n: int, folder: str) -> tuple[Path, torch.Tensor]:
    """Gaussian rows times a decaying basis, again and again, and ``A^T A`` in float64."""
    path = Path(folder) / f"{m}x{n}.npy"
    torch.manual_seed(0)  # of the same numbers for every rank
    basis = torch.linalg.qr(torch.randn(n, n)).Q * torch.arange(1, n + 1)[:, None] ** -0.5
    pattern = torch.randn(min(m, PATTERN), n) @ basis
    assert m % len(pattern) == 0
    if not path.exists():
        array = np.lib.format.open_memmap(path, "w+", np.float32, (m, n))
        for first in range(0, m, len(pattern)):
            array[first : first + len(pattern)] = pattern.numpy()
        array.flush()
    pattern = pattern.double()
    return path, pattern.mT @ pattern * (m // len(pattern))


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@contextmanager
def dropping(path: Path, cold: bool) -> Iterator[None]:
    """Every reading of the file begins without any of it in the page cache."""
    blocks = MatrixFile.blocks

    def dropped(self: MatrixFile) -> Iterator[torch.Tensor]:
        drop(path)
        yield from blocks(self)

    if cold:
        MatrixFile.blocks = dropped  # type: ignore[method-assign]
    try:
        yield
    finally:
        MatrixFile.blocks = blocks  # type: ignore[method-assign]


def read(path: Path) -> None:
    source = MatrixFile(str(path), None)
    for _ in range(SWEEPS):
        for _ in source.blocks():
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


def dense_row(
    m: int, n: int, k: int, runs: int, folder: str, cold: bool, roofline: Any
) -> dict[str, Any]:
    path, moments = file(m, n, folder)
    contenders: dict[str, Callable[[], Any]] = {
        "read": lambda: read(path),
        "structmat": lambda: sm.linalg.svd_out_of_core(path, k, progress=False),
    }
    best = dict.fromkeys(contenders, float("inf"))
    excess: dict[str, float] = {}
    with dropping(path, cold):
        for _ in range(runs):
            for name, call in contenders.items():
                seconds, found = timed(call)
                best[name] = min(best[name], seconds)
                if found is not None:
                    excess[name] = excess_of(found.Vh, moments)
    if m * n <= 10**8 and k == 32 and find_spec("sklearn"):  # it takes long
        name = "scikit-learn IncrementalPCA"
        best[name], found = timed(lambda: incremental(path, k))
        excess[name] = excess_of(found, moments)
    width = k + -(-(k + 8) // 16) * 16 - k
    flops, bytes_ = 4 * SWEEPS * m * n * width, 4 * SWEEPS * m * n
    floor = roofline.floor(flops, bytes_, torch.float32)
    return {
        "rows": m, "n": n, "rank": k, "cold": cold, "flops": flops, "bytes": bytes_,
        "seconds": best, "over reading": {"structmat": best["structmat"] / best["read"]},
        "excess": excess, "floor": floor, "share": floor / best["structmat"],
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
    options.add_argument("--cold", action="store_true", help="files on the disk, not in memory")
    options.add_argument("--folder", help="where the file goes (default: a temporary folder)")
    args = options.parse_args()
    if args.device != "cpu":
        raise SystemExit("bench_out_of_core.py measures the CPU")
    start(args)
    warnings.filterwarnings("ignore", message="Sparse")
    roofline = Roofline(args.device, args.tiny)
    files, sparse = TINY if args.tiny else (COLD, []) if args.cold else (FILES, SPARSE)
    found = [shown(sparse_row(*size)) for size in sparse]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found += [shown(dense_row(*size, folder, args.cold, roofline)) for size in files]
    write(args, "out_of_core", found)


if __name__ == "__main__":
    main()
