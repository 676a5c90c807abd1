# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.gaussian: published Philox vectors, the normal law, the same bits everywhere."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import structmat as sm
from structmat import _C

# Known answers of Random123 for philox4x32-10: counter, key, output.
KNOWN = [
    (
        (0x00000000,) * 4,
        (0x00000000,) * 2,
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 of counters (..., 4) in NumPy."""
    c = [counter[..., k].astype(np.uint64) for k in range(4)]
    k0, k1 = (np.uint64(k) for k in key)
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ k0,
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ k1,
            p0 & mask,
        ]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack(c, -1)


def quantiles(rows: int, cols: int, seed: int, stream: int) -> torch.Tensor:
    """What gaussian() is defined to be, in double precision."""
    i, group = np.meshgrid(np.arange(rows), np.arange((cols + 3) // 4), indexing="ij")
    counter = np.stack([i, 0 * i, group, 0 * i + stream], -1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(rows, -1)[:, :cols]
    return torch.special.ndtri(torch.from_numpy((2.0 * words + 1) / 2.0**33))


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_published_vectors(counter, key, output):
    assert tuple(int(w) for w in philox(np.array(counter), key)) == output


@pytest.mark.parametrize(
    ("rows", "cols", "seed", "stream"), [(5, 7, 0, 0), (130, 33, 2**40 + 5, 9)]
)
def test_is_the_normal_quantile_of_philox(backend, rows, cols, seed, stream):
    found = sm.linalg.gaussian(rows, cols, seed=seed, stream=stream, device=backend.device)
    wanted = quantiles(rows, cols, seed, stream)
    assert (found.cpu().double() - wanted).abs().max() < 2e-6


def test_moments_of_a_million():
    x = sm.linalg.gaussian(1000, 1000, seed=1, dtype=torch.float64)
    # Standard deviations of the estimates: 1e-3, 1.4e-3, 2.4e-3 (skewness), 4.9e-3 (kurtosis).
    assert abs(x.mean()) < 4e-3
    assert abs(x.square().mean() - 1) < 6e-3
    assert abs(x.pow(3).mean()) < 1.6e-2
    assert abs(x.pow(4).mean() - 3) < 4e-2
    # Rows, columns and streams are independent: entries of the Gram matrices are N(0, 1000).
    for gram in (x.T @ x, x @ x.T, x @ sm.linalg.gaussian(1000, 1000, seed=1, stream=1).double()):
        off = gram - torch.diag(gram.diag())
        assert off.abs().max() < 6 * 1000**0.5


def test_tail():
    x = sm.linalg.gaussian(2000, 2000, seed=3)
    for bound, expected in ((3.0, 2.6998e-3), (4.0, 6.334e-5)):
        share = (x.abs() > bound).double().mean().item()
        assert abs(share - expected) < 5 * (expected / x.numel()) ** 0.5


def test_same_bits_on_every_backend(backend):
    here = sm.linalg.gaussian(37, 101, seed=5, stream=2, device=backend.device)
    assert np.array_equal(here.cpu().numpy(), _C.gaussian(37, 101, seed=5, stream=2))


def test_same_bits_for_any_thread_count_and_in_any_larger_matrix(threads):
    whole = _C.gaussian(500, 300, seed=5, threads=1)
    for count in (2, 3):
        assert np.array_equal(whole, _C.gaussian(500, 300, seed=5, threads=count))
    assert np.array_equal(whole[:77, :19], _C.gaussian(77, 19, seed=5))


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_same_bits_from_every_instruction_set(level):
    code = "from structmat import _C; print(_C.gaussian(50, 70, seed=11).tobytes().hex())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "STRUCTMAT_SIMD": level},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    assert found == _C.gaussian(50, 70, seed=11).tobytes().hex()


def test_float64_is_the_float32_numbers(backend):
    wide = sm.linalg.gaussian(9, 10, seed=2, dtype=torch.float64, device=backend.device)
    assert torch.equal(wide, sm.linalg.gaussian(9, 10, seed=2, device=backend.device).double())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(backend, shape):
    assert sm.linalg.gaussian(*shape, device=backend.device).shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.bfloat16}, TypeError, "float32 or float64, got torch.bfloat16"),
        ({"rows": -1}, ValueError, "no negative size"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 2**63}, ValueError, "wanted 0 to 2"),
        ({"stream": 2**32}, ValueError, "stream is 4294967296"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        sm.linalg.gaussian(**({"rows": 2, "cols": 2} | arguments))


def test_operator(backend):
    like = torch.empty(0, device=backend.device)
    torch.library.opcheck(torch.ops.structmat.gaussian.default, (like, 3, 5, 1, 0))
    compiled = torch.compile(
        lambda: sm.linalg.gaussian(4, 6, seed=3, device=backend.device),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(), sm.linalg.gaussian(4, 6, seed=3, device=backend.device))
