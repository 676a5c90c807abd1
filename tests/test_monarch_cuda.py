# SPDX-License-Identifier: Apache-2.0
"""What is particular to the CUDA kernels of monarch_linear: both ways to run it, edges of tiles,
packs that several blocks share, sums over tokens in parts."""

import pytest
import reference
import torch
from conftest import Backend
from reference import assert_close, gradients, make

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


def compare(size: tuple[int, ...], dtype: torch.dtype, device: str, **options: str) -> None:
    """The result and all gradients, of whole tensors: rows then begin where packs do."""
    T, K, J, R, I, L = size
    x = make(T, K * I, dtype=dtype, device=device, layout="contiguous")
    args = [x, *factors(K, J, R, I, L, dtype, device)]
    args.append(make(J * L, dtype=dtype, device=device, layout="contiguous"))
    dy = make(T, J * L, dtype=dtype, device=device, layout="contiguous")
    with torch.no_grad():
        inferred = sm.ops.monarch_linear(*args, **options)
        assert torch.equal(inferred, sm.ops.monarch_linear(*args, **options))
    y = sm.ops.monarch_linear(*[a.requires_grad_() for a in args], **options)
    found = (inferred, y, *torch.autograd.grad(y, args, dy))
    want, grads = gradients(lambda *a: reference.monarch_linear(*a, **options), args, dy)
    for a, b in zip(found, (want, want, *grads), strict=True):
        scale = max(1.0, b.square().mean().sqrt().item())
        assert_close(a, b, dtype, terms=max(T, I + K * R, L + J * R), scale=scale)


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
    for dtype in HALF:
        compare(size, dtype, backend.device)


@pytest.mark.parametrize("size", [(19, 2, 8, 3, 8, 5), (35, 2, 8, 4, 8, 8)], ids=str)
def test_packs_of_interleaved_output(backend: Backend, size) -> None:
    compare(size, torch.bfloat16, backend.device, output="interleaved", activation="gelu")


def test_input_that_begins_anywhere(backend: Backend) -> None:
    """Rows of x that are no whole packs, in one launch whose weights are."""
    args = factors(2, 3, 4, 16, 8, torch.bfloat16, backend.device)
    x = make(35, 33, dtype=torch.bfloat16, device=backend.device, layout="contiguous")[:, 1:]
    want = reference.monarch_linear(*(reference.exact(a) for a in (x, *args)))
    assert_close(sm.ops.monarch_linear(x, *args), want, torch.bfloat16, terms=16 + 8)


def test_groups_of_output_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the grid takes some of the output blocks where shared memory holds no more."""
    monkeypatch.setenv("STRUCTMAT_EMULATE_SHARED", "20000")
    compare((35, 2, 7, 8, 8, 8), torch.bfloat16, backend.device)


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
    compare((600, 2, 1, 3, 4, 5), dtype, backend.device)
    compare((600, 1, 2, 8, 8, 8), dtype, backend.device)
