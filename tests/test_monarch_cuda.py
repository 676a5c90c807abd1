# SPDX-License-Identifier: Apache-2.0
"""What is particular to the CUDA kernels of monarch_linear: both ways to run it, edges of tiles,
packs that several blocks share, sums over tokens in parts."""

import pytest
import torch
from conftest import Backend
from reference import assert_close, exact, make

import structmat as sm

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _only_cuda(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("about the CUDA kernels")


def factors(K: int, J: int, R: int, I: int, L: int, dtype: torch.dtype, device: str):
    W1 = make(K, J, R, I, dtype=dtype, device=device, layout="contiguous", scale=I**-0.5)
    return W1, make(
        J, L, K, R, dtype=dtype, device=device, layout="contiguous", scale=(K * R) ** -0.5
    )


def forward(x: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor) -> torch.Tensor:
    x, W1, W2 = exact(x), exact(W1), exact(W2)
    h = torch.einsum("kjri,tki->tkjr", W1, x.unflatten(1, (W1.shape[0], -1)))
    return torch.einsum("jlkr,tkjr->tjl", W2, h).flatten(1)


# Runs of one, two and four numbers make packs with those of other blocks; whole packs; odd sizes;
# a tile and one more in every direction.
SIZES = [
    (17, 8, 8, 1, 8, 16),
    (3, 11, 3, 1, 16, 24),
    (19, 4, 5, 2, 16, 8),
    (65, 2, 3, 4, 40, 16),
    (5, 2, 2, 8, 72, 66),
    (34, 3, 2, 5, 7, 33),
    (130, 1, 2, 66, 16, 8),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shared", ["one launch", "two launches"])
def test_one_launch_and_two(
    backend: Backend, size, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared == "two launches" and backend.name == "cuda-emulated":
        monkeypatch.setenv("STRUCTMAT_EMULATE_SHARED", "1000")
    T, K, J, R, I, L = size
    for dtype in HALF:
        W1, W2 = factors(K, J, R, I, L, dtype, backend.device)
        x = make(T, K * I, dtype=dtype, device=backend.device, layout="contiguous")
        got = sm.ops.monarch_linear(x, W1, W2)
        assert torch.equal(got, sm.ops.monarch_linear(x, W1, W2))
        assert_close(got, forward(x, W1, W2), dtype, terms=I + K * R)


def test_groups_of_output_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the grid takes some of the output blocks where shared memory holds no more."""
    monkeypatch.setenv("STRUCTMAT_EMULATE_SHARED", "20000")
    W1, W2 = factors(2, 7, 8, 8, 8, torch.bfloat16, backend.device)
    x = make(35, 16, dtype=torch.bfloat16, device=backend.device, layout="contiguous")
    assert_close(sm.ops.monarch_linear(x, W1, W2), forward(x, W1, W2), torch.bfloat16, terms=24)


def test_not_a_number_stays_in_its_token(backend: Backend) -> None:
    """What fills up tiles, to whole packs and beyond the last token, touches no result."""
    W1, W2 = factors(2, 3, 3, 5, 9, torch.bfloat16, backend.device)
    x = make(18, 10, dtype=torch.bfloat16, device=backend.device, layout="contiguous")
    x[3] = torch.nan
    bad = sm.ops.monarch_linear(x, W1, W2).isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_tokens_in_parts(backend: Backend, dtype: torch.dtype) -> None:
    """Gradients of the weights are cut into parts of 256 tokens or more, added in one order."""
    T, K, J, R, I, L = 600, 2, 1, 3, 4, 5
    W1, W2 = factors(K, J, R, I, L, dtype, backend.device)
    x = make(T, K * I, dtype=dtype, device=backend.device)
    dy = make(T, J * L, dtype=dtype, device=backend.device)
    leaves = [W1.requires_grad_(), W2.requires_grad_()]
    found = [torch.autograd.grad(sm.ops.monarch_linear(x, *leaves), leaves, dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact_leaves = [exact(a).requires_grad_() for a in leaves]
    h = torch.einsum("kjri,tki->tkjr", exact_leaves[0], exact(x).unflatten(1, (K, I)))
    y = torch.einsum("jlkr,tkjr->tjl", exact_leaves[1], h).flatten(1)
    for got, want in zip(found[0], torch.autograd.grad(y, exact_leaves, exact(dy)), strict=True):
        # 16-bit h and dh are rounded before they are summed
        assert_close(got, want, dtype, terms=T, scale=want.square().mean().sqrt().item())
