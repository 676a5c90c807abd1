# SPDX-License-Identifier: Apache-2.0
"""What is particular to the CUDA kernels of sparse_low_rank_linear: each way to run it
(csrc/core/sparse_low_rank/sparse_low_rank_plan.h), edges of tiles, whole packs and odd sizes."""

import pytest
import torch
from conftest import Backend
from reference import assert_close, exact, gradients, make

import structmat as sm

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _only_cuda(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("about the CUDA kernels")


def compare(
    size: tuple[int, int, int, int],
    density: float,
    dtype: torch.dtype,
    device: str,
    family: str = "uniform",
    *,
    base: torch.dtype | None = None,
    layout: str = "contiguous",
) -> None:
    """The result and all gradients, twice with the same bits."""
    T, m, n, r = size
    pattern = sm.SparsePattern.random(m, n, density, family=family)

    def normal(*shape: int, scale: float = 1.0, layout: str = layout) -> torch.Tensor:
        return make(*shape, dtype=dtype, device=device, layout=layout, scale=scale)

    x, dy = normal(T, n), normal(T, m)
    args = [x, normal(m, r, scale=0.5), normal(r, n, scale=0.5)]
    args += [normal(pattern.nnz, layout="contiguous"), normal(m, layout="contiguous")]
    W = None if base is None else normal(m, n).to(base)
    on_host, pattern = pattern, pattern.to(device)

    def run() -> list[torch.Tensor]:
        x, U, V, values, bias = leaves = [a.detach().requires_grad_() for a in args]
        y = sm.ops.sparse_low_rank_linear(x, U, V, pattern, values, bias, base=W)
        with torch.no_grad():
            inferred = sm.ops.sparse_low_rank_linear(x, U, V, pattern, values, bias, base=W)
        return [inferred, y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def dense(x, U, V, values, bias):
        weight = U @ V + on_host.scatter(values)
        return x @ (weight if W is None else weight + exact(W)).T + bias

    found, again = run(), run()
    want, grads = gradients(dense, args, dy)
    for a, b, c in zip(found, again, (want, want, *grads), strict=True):
        assert torch.equal(a, b)
        scale = max(1.0, c.square().mean().sqrt().item())
        assert_close(a, c, dtype, terms=max(T, m, n) + r, scale=scale)


# One token, and groups of four and of eight.
@pytest.mark.parametrize("tokens", [1, 3, 19])
def test_few_tokens(backend: Backend, dtype: torch.dtype, tokens: int) -> None:
    compare((tokens, 37, 41, 3), 0.1, dtype, backend.device, base=dtype if tokens == 3 else None)


# A device that holds two blocks, which then take several pieces each, of h too; m below r.
def test_few_tokens_on_a_small_device(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTMAT_EMULATE_SMS", "1")
    compare((19, 37, 41, 3), 0.1, torch.float32, backend.device)
    compare((1, 7, 2100, 9), 0.1, torch.bfloat16, backend.device)


def test_few_tokens_of_more_columns_than_shared_memory_holds(backend: Backend) -> None:
    compare((7, 9, 4200, 2), 0.03, torch.float32, backend.device)


# More rows and columns than a block has; few entries, so that 16-bit types stay sparse.
@pytest.mark.parametrize("family", ["uniform", "vector16"])
def test_sparse_rows(backend: Backend, dtype: torch.dtype, family: str) -> None:
    compare((67, 260, 530, 2), 0.01, dtype, backend.device, family)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", ["uniform", "vector16", "block16"])
def test_tiles(backend: Backend, dtype: torch.dtype, family: str) -> None:
    compare((70, 66, 75, 5), 0.2, dtype, backend.device, family)
    compare((40, 72, 48, 8), 0.3, dtype, backend.device, family, base=dtype)


# Strips of 16 rows, the last of fewer, some without columns; blocks for dx too. Whole packs and
# none, no low rank, both tile sizes, two slabs.
@pytest.mark.parametrize("family", ["vector16", "block16"])
@pytest.mark.parametrize("dtype", HALF)
def test_strips(backend: Backend, dtype: torch.dtype, family: str) -> None:
    for *size, density in ((70, 54, 189, 5, 0.08), (40, 64, 176, 8, 0.07), (33, 40, 200, 0, 0.04)):
        assert 0 < sm.SparsePattern.random(*size[1:3], density, family=family).density <= 0.1
        compare(tuple(size), density, dtype, backend.device, family, layout="slice")


@pytest.mark.parametrize("family", ["vector16", "block16"])
def test_large_strips_and_slabs(backend: Backend, family: str) -> None:
    compare((257, 33, 200, 8), 0.08, torch.bfloat16, backend.device, family)
    compare((33, 20, 4200, 0), 0.01, torch.float16, backend.device, family)


# Sums are spread over columns from 1,024 tokens on: tokens that make no whole groups of 32, strips
# of fewer rows, some without entries in a piece and some with more than 16, ranks above 128 and of
# no whole steps, packs and none, two slabs, more than 32 strips.
@pytest.mark.parametrize(
    ("size", "density", "layout"),
    [
        ((1030, 54, 300, 5), 0.05, "slice"),
        ((1024, 40, 600, 136), 0.06, "contiguous"),
        ((1025, 23, 264, 1), 0.004, "contiguous"),
        ((1056, 21, 4200, 0), 0.02, "slice"),
        ((1027, 520, 70, 0), 0.02, "contiguous"),
    ],
)
@pytest.mark.parametrize("dtype", HALF)
def test_spread_sums(
    backend: Backend,
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    density: float,
    layout: str,
) -> None:
    compare(size, density, dtype, backend.device, "vector16", layout=layout)


# Other GPUs have less shared memory, and blocks then narrower pieces.
def test_spread_sums_in_narrow_pieces(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTMAT_EMULATE_SHARED", str(99 * 1024))
    compare((1024, 32, 600, 8), 0.05, torch.bfloat16, backend.device, "vector16")


def test_large_tiles_and_full_rows(backend: Backend) -> None:
    compare((260, 136, 40, 8), 0.9, torch.bfloat16, backend.device)


def test_written_weight(backend: Backend, dtype: torch.dtype) -> None:
    compare((1026, 17, 20, 3), 0.3, dtype, backend.device)
    compare((1024, 16, 24, 8), 0.5, dtype, backend.device, "block16", base=dtype)


@pytest.mark.parametrize("with_base", [False, True])
def test_columns(backend: Backend, dtype: torch.dtype, with_base: bool) -> None:
    base = dtype if with_base else None
    compare((9, 33, 40, 5), 0.2, dtype, backend.device, "columns", base=base, layout="slice")


# 2^23 numbers of the base are widened at a time, here 128 rows and then two.
def test_second_block_of_a_narrow_base(backend: Backend) -> None:
    size = 2, 130, 1 << 16, 0
    compare(size, 2**-14, torch.float32, backend.device, "columns", base=torch.bfloat16)


# A number that is not finite reaches every output of its token, in each of the ways.
@pytest.mark.parametrize(
    ("tokens", "family"),
    [
        *((t, f) for t in (5, 40, 1030) for f in ("uniform", "columns")),
        (40, "block16"),
        (1030, "vector16"),
    ],
)
def test_not_finite(backend: Backend, dtype: torch.dtype, tokens: int, family: str) -> None:
    m, n, density = {"block16": (48, 176, 0.09), "vector16": (40, 176, 0.05)}.get(
        family, (17, 20, 0.3)
    )
    pattern = sm.SparsePattern.random(m, n, density, family=family).to(backend.device)
    values = make(pattern.nnz, dtype=dtype, device=backend.device, layout="contiguous")
    x = make(tokens, n, dtype=dtype, device=backend.device)
    x[1, n - 1], x[3, 0] = torch.inf, torch.nan
    dy = make(tokens, m, dtype=dtype, device=backend.device)
    dy[2, 0] = -torch.inf
    x.requires_grad_()
    y = sm.ops.sparse_linear(x, pattern, values)
    (dx,) = torch.autograd.grad(y, x, dy)
    for out, bad in ((y, (1, 3)), (dx, (2,))):
        nan = out.isnan()
        for token in range(tokens):
            assert nan[token].all() if token in bad else not nan[token].any()


@pytest.mark.parametrize(
    ("family", "strip", "message"),
    [
        ("uniform", 16, "strips of 16 rows"),
        ("block16", 2, "strips of 2 rows"),
        ("vector16", 16, None),  # no strips either, which only the index tells: nothing is promised
    ],
)
def test_strips_that_are_none(
    backend: Backend, family: str, strip: int, message: str | None
) -> None:
    mask = torch.zeros(400, 64, dtype=torch.bool)
    mask[:, : 16 if family == "block16" else 1] = True  # its transpose: many entries in few rows
    pattern = sm.SparsePattern.from_mask(mask, family=family).to(backend.device)
    dy, values = (
        make(*shape, dtype=torch.bfloat16, device=backend.device)
        for shape in ((40, 400), (pattern.nnz,))
    )
    other, permutation = pattern.transpose()
    index = pattern.starts, pattern.columns, 400, 64, pattern.group
    arguments = dy, None, None, None, *index, values, None, other.starts, other.columns, permutation
    backward = torch.ops.structmat.sparse_low_rank_linear_backward
    if message is None:
        assert backward(*arguments, strip, None, True, False, False, False)[0].shape == (40, 64)
        return
    with pytest.raises(RuntimeError, match=message):
        backward(*arguments, strip, None, True, False, False, False)
