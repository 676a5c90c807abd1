# SPDX-License-Identifier: Apache-2.0
"""block_svd: truncated SVDs of many blocks, against float64, on every back end."""

import pytest
import torch
from conftest import Backend
from reference import LAYOUTS, UNIT, exact, make

WIDE = (torch.float32, torch.float64)


def check_triplets(A: torch.Tensor, rank: int) -> None:
    """Residuals, orthogonality, values and what is left out, all in units of rounding."""
    U, S, Vh, norms = torch.ops.structmat.block_svd(A, rank)
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    assert U.dtype == S.dtype == Vh.dtype == wide
    assert norms.dtype == torch.float64
    A, U, S, Vh, norms = (exact(t) for t in (A, U, S, Vh, norms))
    values = torch.linalg.svdvals(A)
    top = values[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    allowed = (8 if wide == torch.float32 else 100) * 2 * UNIT[wide]
    eye = torch.eye(rank, dtype=torch.float64)
    assert U.shape == (*A.shape[:-1], rank)
    assert Vh.shape == (*A.shape[:-2], rank, A.shape[-1])
    assert float(((S - values[..., :rank]).abs() / top).max()) < allowed
    assert bool((S.diff(dim=-1) <= 0).all())
    for gram in (U.mT @ U, Vh @ Vh.mT):
        assert float((gram - eye).abs().max()) < allowed
    for residual in (A @ Vh.mT - U * S[..., None, :], (U.mT @ A - S[..., None] * Vh).mT):
        assert float((residual.norm(dim=-2) / top).max()) < allowed
    left = values[..., rank:].norm(dim=-1)
    assert float(((norms[..., 1] - left).abs() / top[..., 0]).max()) < allowed
    assert float(((norms[..., 0] - values.norm(dim=-1)).abs() / top[..., 0]).max()) < allowed


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 7), (5, 13), (13, 5), (16, 16), (33, 20)])
def test_block_svd(backend: Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    A = make(2, *shape, dtype=dtype, device=backend.device)
    for rank in sorted({1, min(3, *shape), min(shape)}):
        check_triplets(A, rank)


@pytest.mark.parametrize("shape", [(64, 64), (130, 100), (200, 210)])
def test_block_svd_of_larger_blocks(shape: tuple[int, int]) -> None:
    for dtype in WIDE:
        for rank in (1, 9, min(shape) // 2, min(shape)):
            check_triplets(make(2, *shape, dtype=dtype), rank)


@pytest.mark.parametrize("shape", [(48, 78), (32, 158)])
def test_block_svd_at_48_kilobytes(backend: Backend, shape: tuple[int, int]) -> None:
    """What a GPU gives a kernel unasked, which static shared memory shares."""
    if backend.name != "cuda":
        pytest.skip("about the limits of a GPU")
    check_triplets(make(2, *shape, dtype=torch.float32, device=backend.device), 5)


@pytest.mark.parametrize("dtype", WIDE)
def test_block_svd_of_hard_blocks(backend: Backend, dtype: torch.dtype) -> None:
    """Zeros, equal, close and falling values, lower rank, numbers near the ends of the range."""
    Q, P = (torch.linalg.qr(torch.randn(18, 18, dtype=torch.float64)).Q for _ in range(2))
    steps = torch.arange(18, dtype=torch.float64)
    spectra = [steps * 0 + 1, 1 + 1e-9 * steps, 10**-steps, (steps < 4).double(), steps * 0]
    A = torch.stack([Q * s @ P for s in spectra]).to(dtype).to(backend.device)
    for rank in (1, 6, 18):
        check_triplets(A, rank)
    large, small = (1e30, 1e-36) if dtype == torch.float32 else (1e150, 1e-150)
    check_triplets(A[:4] * large, 5)
    check_triplets(A[:4] * small, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_svd_reads_strides(backend: Backend, layout: str) -> None:
    W = make(12, 30, dtype=torch.float32, device=backend.device, layout=layout)
    blocks = W.unflatten(1, (3, 10)).unflatten(0, (2, 6)).permute(2, 0, 1, 3)
    check_triplets(blocks, 2)
    check_triplets(blocks.mT, 2)
    check_triplets(W, 2)
    check_triplets(W[:1].expand(4, 30), 2)


def test_block_svd_of_more_than_shared_memory_holds(backend: Backend) -> None:
    check_triplets(make(2, 3, 10_000, device=backend.device), 2)


def test_block_svd_marks_what_is_not_finite(backend: Backend) -> None:
    A = make(3, 6, 5, device=backend.device)
    A[1, 2, 3] = torch.inf
    parts = torch.ops.structmat.block_svd(A, 2)
    for part in parts:
        assert part[1].isnan().all()
        assert part[0].isfinite().all()
        assert part[2].isfinite().all()


def test_block_svd_gives_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    A = make(40, 20, 24, dtype=torch.float32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(torch.ops.structmat.block_svd(A, 3))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_block_svd_of_nothing_and_bad_arguments(backend: Backend) -> None:
    op = torch.ops.structmat.block_svd
    assert op(make(0, 4, 3, device=backend.device), 2)[0].shape == (0, 4, 2)
    A = make(2, 4, 3, device=backend.device)
    for bad, rank, message in [
        (A, 4, r"rank is 4, wanted 1 to 3 for blocks of shape \(4, 3\)"),
        (A, 0, "rank is 0"),
        (A[:, :0], 1, "empty"),
        (A[0, 0], 1, "2 to 4 dimensions, got 1"),
        (A.to(torch.int32), 1, "float32, float64, bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=f"block_svd.*{message}"):
            op(bad, rank)


def test_block_svd_opcheck() -> None:
    torch.library.opcheck(torch.ops.structmat.block_svd.default, (make(2, 3, 6, 5), 2))
