# SPDX-License-Identifier: Apache-2.0
"""Matrices read in blocks of rows, against torch.linalg.svd in double precision."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import UNIT
from test_sizes import sparse_file
from test_svd import SPECTRA, matrix

import structmat as sm

svd = sm.linalg.svd_out_of_core
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    torch.set_num_threads(1)  # the problems are small


def rows_of(A, size):
    return lambda: iter(A.split(size))


def verify(A, result, center=False, excess=0.15):
    U, S, Vh = (factor.double() for factor in result)
    dtype, k = result.S.dtype, len(S)
    A = A.double() - A.double().mean(0) if center else A.double()
    eye = torch.eye(k, dtype=torch.float64)
    orthogonal = 1e-13 if dtype == torch.float64 else 1e-5
    assert (U.mT @ U - eye).abs().max() <= orthogonal
    assert (Vh @ Vh.mT - eye).abs().max() <= orthogonal
    assert (S[1:] <= S[:-1]).all()
    assert (U.gather(0, U.abs().argmax(0)[None]) > 0).all()
    truth = torch.linalg.svdvals(A)
    norm = float(truth.norm()) or 1.0
    error = float((A - (U * S) @ Vh).norm()) / norm
    rounding = 256 * UNIT[dtype]
    assert error <= (1 + excess) * float(truth[k:].norm()) / norm + rounding
    assert result.info.error <= 1.25 * max(error, rounding)
    assert result.info.error >= error / 1.25 - rounding
    assert result.info.converged


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [False, True])
def test_accuracy(spectrum, dtype, center):
    for m, n in ((210, 90), (90, 130)):
        A = matrix(m, n, spectrum, dtype) + 3 * center
        verify(A, svd(rows_of(A, 32), 12, center=center), center)


def test_sweeps_are_worth_two_passes():
    """The excess error of p sweeps is below that of 2 p passes of plain subspace iteration."""
    A = matrix(400, 300, "slow")
    best = float(torch.linalg.svdvals(A)[20:].norm())
    excess = []
    for sweeps in (1, 2, 3):
        U, S, Vh = result = svd(rows_of(A, 100), 20, sweeps=sweeps, oversample=12)
        assert result.info.sweeps == sweeps
        excess.append(float((A - (U * S) @ Vh).norm()) / best - 1)
        X = torch.randn(300, 32, dtype=torch.float64)
        for _ in range(sweeps):
            Q = torch.linalg.qr(A @ X).Q
            X = torch.linalg.qr(A.mT @ Q).Q
        P, sigma, Wh = torch.linalg.svd(Q.mT @ A, full_matrices=False)
        plain = float((A - Q @ ((P * sigma)[:, :20] @ Wh[:20])).norm()) / best - 1
        assert excess[-1] < 1.3 * plain
    assert excess[1] < excess[0] / 4
    assert excess[2] < excess[1] / 2


def falling(n):
    """Singular values from 1 to 1e-6, float32."""
    U, _, Vh = torch.linalg.svd(matrix(300, n, "slow"), full_matrices=False)
    return ((U * torch.logspace(0, -6, n, dtype=torch.float64)) @ Vh).float()


@pytest.mark.parametrize("sweeps", [1, 2])
def test_small_values_are_not_lost_silently(sweeps):
    """Values below the root of eps vanish from A^T (A X) in the first sweep; one more has them."""
    A, sigma = falling(120), torch.logspace(0, -6, 120, dtype=torch.float64)
    result = svd(rows_of(A, 50), 90, oversample=10, sweeps=sweeps)
    assert result.info.sweeps == sweeps + 1
    off = (result.S.double() - sigma[:90]).abs()
    assert (off <= 2e-7 + (0.5 if sweeps == 1 else 0.05) * sigma[:90]).all()
    flat = svd(rows_of(matrix(300, 120, "slow", torch.float32), 50), 90, sweeps=sweeps)
    assert flat.info.sweeps == sweeps


@pytest.mark.parametrize("center", [False, True])
def test_exactly_low_rank(center):
    for seed in range(40):
        g = np.random.default_rng(seed)
        k = 8
        A = torch.from_numpy(g.standard_normal((500, k)) @ g.standard_normal((k, 100)))
        sweeps = 1 + max(center, seed % 2)
        U, S, Vh = result = svd(rows_of(A, len(A)), k, seed=seed, center=center, sweeps=sweeps)
        exact = A - A.mean(0) if center else A
        assert (exact - (U * S) @ Vh).norm() <= 1e-12 * exact.norm()
        assert result.info.error <= 1e-12


@pytest.mark.parametrize(("m", "n"), [(1, 9), (3, 13), (4, 44), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_rows_than_columns_are_drawn(m, n, dtype):
    A = torch.from_numpy(np.random.default_rng(m).standard_normal((m, n))).to(dtype)
    for sweeps in (1, 2, 3):
        verify(A, svd(rows_of(A, 2), 1, sweeps=sweeps))
        verify(A, svd(rows_of(A, 2), m, sweeps=sweeps))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_stay_in_range(scale):
    A = (matrix(90, 70, "harmonic") * scale).float()
    A[:30] *= 1e-8
    U, S, Vh = result = svd(rows_of(A, 30), 10)
    A = A.double() / scale
    error = (A - (U.double() * (S.double() / scale)) @ Vh.double()).norm() / A.norm()
    assert result.info.error == pytest.approx(float(error), rel=0.1)
    assert error < 1.2 * torch.linalg.svdvals(A)[10:].norm() / A.norm()


def test_blocks_of_all_kinds():
    A = matrix(120, 50, "harmonic") * (torch.rand(120, 50) < 0.4)
    expected = svd(rows_of(A, 120), 6)

    def scipy_like():
        import scipy.sparse

        return (scipy.sparse.csr_matrix(part.numpy()) for part in A.split(25))

    verify(A, expected)
    for blocks in (
        rows_of(A, 1),
        rows_of(A, 77),
        lambda: [A[:0], A[:50], A[50:50], A[50:], A[:0]],
        lambda: (part.numpy() for part in A.split(25)),
        lambda: (part.to_sparse_csr() for part in A.split(25)),
        lambda: iter([A[:60], A[60:].to_sparse_csr()]),
        lambda: iter(torch.cat([A.mT, A.mT]).mT[:, :50].split(30)),
        scipy_like,
    ):
        found = svd(blocks, 6)
        assert found.info.error == pytest.approx(expected.info.error, rel=1e-6)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    found = svd(lambda: (part.to_sparse_csr() for part in A.split(25)), 6, center=True)
    verify(A, found, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types(dtype):
    A = matrix(120, 50, "harmonic", dtype)
    result = svd(rows_of(A, 50), 6)
    assert result.S.dtype == torch.float32
    verify(A, result)
    assert svd(rows_of(A, 50), 6, dtype=torch.float64).S.dtype == torch.float64


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ["C", "F", ">f8", "f4", "f2", "1", "2"])
def test_npy(tmp_path, kind, center):
    A = matrix(90, 60, "harmonic") + 1
    array = A.numpy()
    if kind == "F":
        array = np.asfortranarray(array)
    elif kind not in ("C", "1", "2"):
        array = array.astype(kind)
    path = tmp_path / "A.npy"
    if kind in ("1", "2"):
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, version=(int(kind), 0))
    else:
        np.save(path, array)
    result = svd(path, 6, center=center, block_rows=17)
    verify(torch.from_numpy(array.astype("f8")), result, center)


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    A, B = matrix(90, 60, "harmonic"), matrix(40, 30, "harmonic").bfloat16()
    save_file(
        {"A": A, "B": B, "v": torch.ones(3), "i": torch.ones(3, 3).int()},
        tmp_path / "x.safetensors",
    )
    save_file({"only": A}, tmp_path / "one.safetensors")
    one = svd(tmp_path / "one.safetensors", 6)
    verify(A, one)
    named = svd(f"{tmp_path}/x.safetensors::A", 6)
    assert torch.equal(named.U, one.U)
    verify(B, svd(f"{tmp_path}/x.safetensors::B", 6))
    for name, error, says in (
        ("x.safetensors", ValueError, "FILE::NAME"),
        ("x.safetensors::C", ValueError, "no 'C'"),
        ("x.safetensors::v", ValueError, "shape"),
        ("x.safetensors::i", TypeError, "I32"),
    ):
        with pytest.raises(error, match=says):
            svd(f"{tmp_path}/{name}", 2)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        svd(tmp_path / "nothing.npy", 2)
    (tmp_path / "A.csv").write_text("1")
    (tmp_path / "rubbish.npy").write_text("1")
    (tmp_path / "rubbish.safetensors").write_text("12345678901")
    np.save(tmp_path / "long.npy", np.ones((9, 9)))
    data = (tmp_path / "long.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(data[:-8])
    np.save(tmp_path / "integers.npy", np.ones((9, 9), dtype=int))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2)))
    np.save(tmp_path / "narrow.npy", np.ones((5, 0)))
    for name, error, says in (
        ("A.csv", ValueError, "no known kind"),
        ("narrow.npy", ValueError, "empty"),
        ("rubbish.npy", ValueError, "no .npy file"),
        ("rubbish.safetensors", ValueError, "no safetensors file"),
        ("short.npy", ValueError, "short.npy"),
        ("integers.npy", TypeError, "int64"),
        ("cube.npy", ValueError, "shape"),
        ("long.npy::A", ValueError, "no name"),
    ):
        with pytest.raises(error, match=says):
            svd(f"{tmp_path}/{name}", 2)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"shape": [-2, -2]}, r"shape \[-2, -2\], wanted"),
        ({"shape": [2.0, 2]}, r"shape \[2.0, 2\], wanted"),
        ({"shape": [2, 3]}, r"data_offsets \[0, 16\], wanted 24 bytes"),
        ({"data_offsets": [-8, 8]}, r"data_offsets \[-8, 8\], wanted 16 bytes"),
        ({"data_offsets": [8, 24]}, "ends before"),
        ({"data_offsets": 0}, "data_offsets 0, wanted 16"),
        (None, "has no dtype"),
    ],
    ids=str,
)
def test_headers_that_contradict_themselves(entry, says, tmp_path):
    whole = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({"A": [] if entry is None else whole | entry}).encode()
    data = torch.ones(2, 2).numpy().tobytes()
    file = tmp_path / "A.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(ValueError, match=says):
        svd(file, 1)


@pytest.mark.parametrize("layout", ["rows", "columns", "slice"])
def test_block_sweep(dtype, layout):
    """Y = A X, and Z grows by A^T Y in units that change; the norm of A."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = [torch.randn(m, 77).to(dtype) * size for m, size in ((130, 2.0), (1, 300.0), (60, 1))]
    X = torch.randn(77, 21).to(wide)
    Z, facts = torch.zeros(77, 13, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    expected = torch.zeros_like(Z)
    for A in blocks:
        if layout == "columns":
            A = A.T.contiguous().T
        elif layout == "slice":
            A = torch.cat([A, A], 1).repeat_interleave(2, 1)[:, ::2][:, :77]
        Y = torch.empty(len(A), 21, dtype=wide)
        torch.ops.structmat.block_sweep(A, X, Y, Z, facts, True)
        exact = A.double() @ X.double()
        expected += A.double().T @ exact[:, :13]
        assert (Y - exact).norm() <= 16 * UNIT[wide] * exact.norm()
        assert (Z * facts[0] - expected).norm() <= 16 * UNIT[wide] * expected.norm()
        assert float(facts[1]) == pytest.approx(float(A.double().norm()), rel=1e-6)
        assert float(facts[2]) == 1
    A[0, 5] = torch.inf
    torch.ops.structmat.block_sweep(A, X, Y, Z, facts, True)
    assert float(facts[2]) == 0


def test_block_sweep_checks():
    A, X, Y = torch.randn(8, 5), torch.randn(5, 3), torch.empty(8, 3)
    Z, facts = torch.zeros(5, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    op = torch.ops.structmat.block_sweep
    torch.library.opcheck(op.default, (A, X, Y, Z, facts, True))
    for arguments, says in (
        ((A, X[:4], Y, Z, facts), "x, y and z are 4 x 3, 8 x 3 and 5 x 2 for A of 8 x 5"),
        ((A, X.double(), Y, Z, facts), "x, y and z are float64, float32 and float64"),
        ((A, X, Y, Z.float(), facts), "float32, float32 and float32"),
        ((A, X.T.contiguous().T, Y, Z, facts), "X must be a matrix with contiguous rows"),
        ((A, X, Y, Z, facts[:2]), "facts must be 3 numbers"),
    ):
        with pytest.raises(RuntimeError, match=says):
            op(*arguments, True)


@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_same_bits_for_any_thread_count(kind):
    """Of what the core computes; QR is torch's."""
    A = torch.from_numpy(matrix(900, 120, "slow").numpy().astype(kind))
    X = torch.randn(120, 24)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        Y, Z = torch.empty(900, 24), torch.zeros(120, 24, dtype=torch.float64)
        torch.ops.structmat.block_sweep(A, X, Y, Z, torch.zeros(3, dtype=torch.float64), False)
        found.append((Y, Z))
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))


MEMORY = """
import json, resource, sys, torch, structmat as sm
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm = torch.randn(2000, 100)
sm.linalg.svd_out_of_core(lambda: iter(warm.split(500)), 4, center=True)
found = [peak()]
for path in sys.argv[1:]:
    sm.linalg.svd_out_of_core(path, 4, center=True)
    found.append(peak())
print(json.dumps(found))
"""


def test_memory_is_bounded_by_the_blocks(tmp_path):
    """Four blocks of 16 MB, one in float32, and what belongs to the 20,000 columns: as much for a
    file of 800 MB as for one of 200."""
    n, paths = 20_000, []
    values = torch.randn(200, n).half()
    for m in (5_000, 20_000):  # 200 and 800 MB
        paths.append(str(tmp_path / f"{m}.npy"))
        sparse_file(paths[-1], m, n, range(m - 200, m), values)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    start, small, large = (peak / 1e6 for peak in json.loads(done.stdout))
    assert small - start < 190, (start, small, large)  # 108 to 160
    assert large - start < 190, (start, small, large)
