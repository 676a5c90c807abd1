# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.orthonormalize, gram_matmul, range_step and svd_tail."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import LAYOUTS, UNIT, assert_close, exact, gradients, make
from reference import gram_matmul as reference_gram_matmul

import structmat as sm
from structmat.linalg.svd_tail import _by_torch

ORTHOGONAL = {torch.float32: 1e-5, torch.float64: 1e-13}
WIDE = [torch.float32, torch.float64]
both = pytest.mark.parametrize("dtype", WIDE, ids=["float32", "float64"])


def spectrum(m, n, decades, dtype=torch.float64):
    left, right = (torch.linalg.qr(torch.randn(s, n, dtype=torch.float64)).Q for s in (m, n))
    return ((left * torch.logspace(0, -decades, n, dtype=torch.float64)) @ right.T).to(dtype)


def kernel(m, n):
    """Columns of Gaussian radial basis functions: numerically of low rank."""
    x, c = (torch.linspace(-1, 1, s, dtype=torch.float64) for s in (m, n))
    return torch.exp(-2 * (x[:, None] - c).square())


def hilbert(m, n):
    i = torch.arange(1, m + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i[:n] - 1)


PANELS = {
    "random": lambda: torch.randn(57, 20, dtype=torch.float64),
    "one column": lambda: torch.randn(9, 1, dtype=torch.float64),
    "square": lambda: torch.randn(33, 33, dtype=torch.float64),
    "condition 1e4": lambda: spectrum(50, 40, 4),
    "condition 1e8": lambda: spectrum(50, 40, 8),
    "condition 1e12": lambda: spectrum(50, 40, 12),
    "condition 1e30": lambda: spectrum(50, 40, 30),
    "radial basis": lambda: kernel(58, 36),
    "vandermonde": lambda: torch.linalg.vander(torch.linspace(-1, 1, 57, dtype=torch.float64))[
        :, -34:
    ],
    "hilbert": lambda: hilbert(58, 24),
    "superdiagonal": lambda: torch.eye(45, dtype=torch.float64).add(
        2 * torch.diag(torch.ones(44, dtype=torch.float64), 1)
    ),
    "zero": lambda: torch.zeros(40, 12, dtype=torch.float64),
    "ones": lambda: torch.ones(20, 20, dtype=torch.float64),
    "duplicates": lambda: torch.randn(50, 3, dtype=torch.float64).repeat(1, 5),
    "some zero": lambda: torch.randn(50, 9, dtype=torch.float64) * (torch.arange(9) % 2),
}


def outside(Q, Y):
    """The share of each column of Y that lies outside the span of Q."""
    Q, Y = exact(Q), exact(Y)
    Y = Y / Y.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    Y = Y / Y.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return (Y - Q @ (Q.T @ Y)).norm(dim=0)


def departure(Q):
    Q = exact(Q)
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=torch.float64)).abs().max().item()


@both
@pytest.mark.parametrize("name", PANELS)
def test_orthonormalize(backend, dtype, name):
    Y = PANELS[name]().to(dtype)
    Q = sm.linalg.orthonormalize(Y.to(backend.device))
    assert Q.dtype == dtype
    assert departure(Q) <= ORTHOGONAL[dtype]
    theirs = outside(torch.linalg.qr(Y).Q, Y)
    assert outside(Q, Y).max() <= 4 * theirs.max() + 8 * UNIT[dtype]


@both
@pytest.mark.parametrize(("m", "l"), [(3000, 70), (4099, 33)])
def test_orthonormalize_many_rows(dtype, m, l):
    """Several slabs and tiles of rows."""
    Y = torch.randn(m, l, dtype=torch.float64).to(dtype)
    for panel in (Y, Y * torch.logspace(0, -10, l), Y[:, torch.arange(l) // 2]):
        Q = sm.linalg.orthonormalize(panel)
        assert departure(Q) <= ORTHOGONAL[dtype]
        theirs = outside(torch.linalg.qr(panel).Q, panel)
        assert outside(Q, panel).max() <= 4 * theirs.max() + 8 * UNIT[dtype]


@pytest.mark.parametrize("seed", range(3))
def test_orthonormalize_radial_basis_of_many_scales(seed):
    """Float64 needs the most passes where singular values fall without end."""
    Y = kernel(400, 60 + 17 * seed)
    Q = sm.linalg.orthonormalize(Y)
    assert departure(Q) <= 1e-13
    assert outside(Q, Y).max() <= 4 * outside(torch.linalg.qr(Y).Q, Y).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_orthonormalize_is_the_q_of_qr(backend, dtype, layout):
    Y = make(41, 7, dtype=dtype, device=backend.device, layout=layout)
    kept = Y.clone()
    Q = sm.linalg.orthonormalize(Y)
    want = torch.linalg.qr(exact(Y))
    assert Q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(Q, want.Q * want.R.diagonal().sign(), terms=41)
    assert torch.equal(Y, kept)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, -30, 30), (torch.float64, -300, 300), (torch.bfloat16, -30, 30)],
    ids=["float32", "float64", "bfloat16"],
)
def test_orthonormalize_scales(backend, dtype, low, high):
    scale = torch.logspace(low, high, 9, dtype=torch.float64)
    Y = (torch.randn(40, 9, dtype=torch.float64) * scale).to(dtype)
    Q, rank = sm.linalg.orthonormalize(Y.to(backend.device), return_rank=True)
    assert departure(Q) <= ORTHOGONAL[Q.dtype]
    assert outside(Q, Y).max() <= 8 * UNIT[Q.dtype]
    assert int(rank) == 9


@both
def test_orthonormalize_subnormal(backend, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    Y = (torch.randn(40, 9, dtype=torch.float64) * tiny * 2.0**-8).to(dtype)
    Q = sm.linalg.orthonormalize(Y.to(backend.device))
    assert departure(Q) <= ORTHOGONAL[dtype]
    assert outside(Q, Y * 2.0**64).max() <= 8 * UNIT[dtype]


@both
def test_orthonormalize_rank(backend, dtype):
    noise = 2 * UNIT[dtype]
    base = torch.randn(50, 6, dtype=dtype)
    near = base[:, :1] + 1e4 * noise * torch.randn(50, 1, dtype=dtype)
    Y = torch.cat([base, base @ torch.randn(6, 8, dtype=dtype), near, 0 * near], dim=1)
    _, rank = sm.linalg.orthonormalize(Y.to(backend.device), return_rank=True)
    assert int(rank) == 7


def test_orthonormalize_batched(backend, dtype):
    Y = make(2, 2, 12, 4, dtype=dtype, device=backend.device, layout="strided")
    Y[1, 1] = 0
    Q, rank = sm.linalg.orthonormalize(Y, return_rank=True)
    assert departure(Q) <= ORTHOGONAL[Q.dtype]
    assert rank.tolist() == [[4, 4], [4, 0]]
    assert torch.equal(Q[1, 0], sm.linalg.orthonormalize(Y[1, 0]))


def test_orthonormalize_replacements_depend_on_the_seed(backend):
    Y = torch.ones(30, 3, device=backend.device)
    first, second = (sm.linalg.orthonormalize(Y, seed=s) for s in (1, 2))
    assert torch.equal(first, sm.linalg.orthonormalize(Y, seed=1))
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(first[:, 0], second[:, 0])


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (0, 7, 3), (2, 4, 0)], ids=str)
def test_orthonormalize_empty(backend, shape):
    Q, rank = sm.linalg.orthonormalize(torch.ones(shape, device=backend.device), return_rank=True)
    assert Q.shape == shape
    assert rank.shape == shape[:-2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@both
def test_orthonormalize_not_finite(backend, dtype, value):
    Y = torch.randn(2, 40, 5, dtype=dtype, device=backend.device)
    Y[1, 17, 3] = value
    with pytest.raises(torch.linalg.LinAlgError, match="orthonormalize: Y contains NaN or Inf"):
        sm.linalg.orthonormalize(Y)


@pytest.mark.parametrize(
    ("Y", "options", "error", "message"),
    [
        (torch.ones(3, 4), {}, ValueError, r"shape \(3, 4\), wanted at least as many rows"),
        (torch.ones(3), {}, ValueError, "at least 2 dimensions, got 1"),
        (torch.ones(3, 2, dtype=torch.int64), {}, TypeError, "Y is torch.int64"),
        (torch.eye(3).to_sparse(), {}, TypeError, "must be dense"),
        ([[1.0]], {}, TypeError, "must be a tensor, got list"),
        (torch.ones(3, 2), {"seed": -1}, ValueError, "seed is -1"),
        (torch.ones(3, 2), {"seed": 1.5}, TypeError, "seed must be an integer"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_orthonormalize_bad_arguments(Y, options, error, message):
    with pytest.raises(error, match=f"orthonormalize: .*{message}"):
        sm.linalg.orthonormalize(Y, **options)


def test_orthonormalize_gradient():
    Y = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sm.linalg.orthonormalize, (Y,))
    assert torch.autograd.gradgradcheck(sm.linalg.orthonormalize, (Y[0].detach().requires_grad_(),))
    with pytest.raises(RuntimeError, match="orthonormalize: there is no rule"):
        torch.func.jvp(sm.linalg.orthonormalize, (Y.detach(),), (Y.detach(),))


def test_orthonormalize_opcheck_and_compile():
    Y = torch.randn(9, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.structmat.orthonormalize.default, (Y, 0))
    compiled = torch.compile(sm.linalg.orthonormalize, fullgraph=True)
    torch.testing.assert_close(compiled(Y), sm.linalg.orthonormalize(Y))


GRAM_SIZES = [(1, 1, 1), (9, 5, 3), (33, 70, 4), (130, 67, 33), (0, 5, 2), (5, 0, 2), (5, 4, 0)]


@pytest.mark.parametrize("size", GRAM_SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_matmul(backend, dtype, size, layout):
    m, n, l = size
    A = make(m, n, dtype=dtype, device=backend.device, layout=layout)
    X = make(n, l, dtype=dtype, device=backend.device, layout=layout)
    want = reference_gram_matmul(A, X)
    scale = (exact(A).abs().mT @ (exact(A).abs() @ exact(X).abs())).square().mean().sqrt().item()
    found = sm.linalg.gram_matmul(A, X)
    assert_close(found, want, dtype, terms=m + n, scale=scale / max(m * n, 1) ** 0.5)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gram_matmul_many_panels(dtype, layout):
    A = make(3001, 301, dtype=dtype, layout=layout, scale=0.05)
    X = make(301, 5, dtype=dtype, scale=0.05)
    assert_close(sm.linalg.gram_matmul(A, X), reference_gram_matmul(A, X), dtype, terms=3001)


PLAN = """
#include "linalg/linalg_plan.h"
using namespace structmat;
constexpr std::int64_t big = std::int64_t{1} << 40;
// Slabs take no more than a quarter of A's memory.
static_assert(gram_slabs_cpu(16384, 8) == 32 && gram_slabs_cpu(4096, 64) == 16);
static_assert(gram_slabs_cpu(4096, 1024) == 1 && gram_slabs_cpu(0, 0) == 1);
static_assert(gram_slabs_cpu(big, 1) == 32);
// On the GPU: panels of 16 MB for narrow X and large A, else the whole, of 16-bit A never.
static_assert(gram_panel_rows_cuda(16384, 4096, 8, DType::f32) == 1024);
static_assert(gram_panel_rows_cuda(16384, 4096, 64, DType::f32) == 16384);
static_assert(gram_panel_rows_cuda(16384, 4096, 64, DType::f64) == 512);
static_assert(gram_panel_rows_cuda(1000, 1000, 8, DType::f32) == 1000);
static_assert(gram_panel_rows_cuda(16384, 4096, 64, DType::bf16) == 1024);
static_assert(gram_panel_rows_cuda(0, 0, 0, DType::f32) == 1);
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_gram_matmul_plan():
    csrc = Path(__file__).parents[1] / "csrc"
    folders = [f"-I{csrc / 'include'}", f"-I{csrc / 'core'}"]
    subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", *folders, "-x", "c++", "-"],
        input=PLAN,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("size", GRAM_SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_matmul_moments(backend, dtype, size, layout):
    m, n, l = size
    A = make(2, m, n, dtype=dtype, device=backend.device, layout=layout)
    X = make(2, n, l, dtype=dtype, device=backend.device, layout=layout)
    Z, sums, norm = sm.linalg.gram_matmul(A, X, return_moments=True)
    assert torch.equal(Z, sm.linalg.gram_matmul(A, X))
    scale = exact(A).abs().mean().item() if A.numel() else 0.0
    assert_close(sums, exact(A).sum(-2), terms=m, scale=scale)
    assert_close(norm, exact(A).square().sum((-2, -1)).sqrt(), terms=m * n)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, 1e300), (torch.float64, 1e-300), (torch.float32, 1e30)],
    ids=str,
)
def test_gram_matmul_moments_of_any_scale(backend, dtype, scale):
    A = torch.randn(70, 20, dtype=dtype)
    X = torch.zeros(20, 1, dtype=dtype, device=backend.device)
    _, sums, norm = sm.linalg.gram_matmul((A * scale).to(backend.device), X, return_moments=True)
    torch.testing.assert_close(sums.cpu() / scale, exact(A).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.cpu() / scale, exact(A).norm(), rtol=1e-6, atol=0)
    A[3, 3] = torch.nan
    assert sm.linalg.gram_matmul(A.to(backend.device), X, return_moments=True).norm.isnan()


def test_gram_matmul_moments_of_many_panels(dtype):
    A, X = make(3001, 301, dtype=dtype, scale=0.05), make(301, 5, dtype=dtype)
    for view in (A, A.mT.contiguous().mT):
        _, sums, norm = sm.linalg.gram_matmul(view, X, return_moments=True)
        assert_close(sums, exact(A).sum(0), terms=3001, scale=0.05 * 3001**0.5)
        assert_close(norm, exact(A).norm(), terms=3001 * 301)


def test_gram_matmul_moments_gradient_and_opcheck():
    A, X = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9, 4), (4, 2)))
    torch.library.opcheck(torch.ops.structmat.gram_matmul_moments.default, (A, X))
    found = sm.linalg.gram_matmul(A, X, return_moments=True)
    assert not found.norm.requires_grad
    assert not found.column_sums.requires_grad
    loss = lambda A, X: sm.linalg.gram_matmul(A, X, return_moments=True).Z  # noqa: E731
    assert torch.autograd.gradcheck(loss, (A, X))
    with pytest.raises(RuntimeError, match="gram_matmul: return_moments has no rule"):
        torch.func.vmap(lambda X: sm.linalg.gram_matmul(A, X, return_moments=True))(X[None])


def test_gram_matmul_batched(backend, dtype):
    A = make(2, 2, 13, 6, dtype=dtype, device=backend.device)
    X = make(2, 2, 6, 3, dtype=dtype, device=backend.device, layout="transposed")
    Z = sm.linalg.gram_matmul(A, X)
    assert torch.equal(Z[1, 0], sm.linalg.gram_matmul(A[1, 0], X[1, 0]))


def test_gram_matmul_gradients(backend):
    A = torch.randn(2, 7, 5, dtype=torch.float64, device=backend.device, requires_grad=True)
    X = torch.randn(2, 5, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    assert torch.autograd.gradcheck(sm.linalg.gram_matmul, (A, X))
    small = [t[0, :4, :3].detach().requires_grad_() for t in (A, X)]
    small[1] = small[1][:3]
    assert torch.autograd.gradgradcheck(sm.linalg.gram_matmul, small)


def test_gram_matmul_gradient_of_each_type(backend, dtype):
    A = make(20, 9, dtype=dtype, device=backend.device, scale=0.3, requires_grad=True)
    X = make(9, 4, dtype=dtype, device=backend.device, requires_grad=True)
    dZ = make(9, 4, dtype=dtype, device=backend.device)
    found = torch.autograd.grad(sm.linalg.gram_matmul(A, X), (A, X), dZ)
    _, want = gradients(reference_gram_matmul, (A, X), dZ)
    for got, reference in zip(found, want, strict=True):
        norm = reference.square().mean().sqrt().item()
        assert_close(got, reference, dtype, terms=60, scale=3 * norm)


def test_gram_matmul_forward_mode_and_transforms(backend):
    A, X, dA, dX = (
        torch.randn(*s, dtype=torch.float64, device=backend.device)
        for s in ((6, 4), (4, 2), (6, 4), (4, 2))
    )
    want = dA.T @ (A @ X) + A.T @ (dA @ X) + A.T @ (A @ dX)
    _, tangent = torch.func.jvp(sm.linalg.gram_matmul, (A, X), (dA, dX))
    torch.testing.assert_close(tangent, want)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in ((A, dA), (X, dX))]
        found = torch.autograd.forward_ad.unpack_dual(sm.linalg.gram_matmul(*duals))
    assert found.tangent is not None
    torch.testing.assert_close(found.tangent, want)
    loss = lambda A: sm.linalg.gram_matmul(A, X).square().sum()  # noqa: E731
    torch.testing.assert_close(
        torch.func.grad(loss)(A), 2 * (lambda Z: A @ (X @ Z.T + Z @ X.T))(A.T @ A @ X)
    )
    batched = torch.func.vmap(sm.linalg.gram_matmul, (None, 0))(A, torch.stack([X, dX]))
    torch.testing.assert_close(batched[1], A.T @ A @ dX)


def test_gram_matmul_propagates_nan(backend, dtype):
    A = torch.ones(30, 6, dtype=dtype, device=backend.device)
    X = torch.zeros(6, 3, dtype=dtype, device=backend.device)
    A[11, 2] = torch.nan
    assert sm.linalg.gram_matmul(A, X).isnan().all()


def test_gram_matmul_opcheck_and_compile():
    A, X = torch.randn(9, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.structmat.gram_matmul.default, (A, X))
    compiled = torch.compile(sm.linalg.gram_matmul, fullgraph=True)
    torch.testing.assert_close(compiled(A, X), sm.linalg.gram_matmul(A, X))


@pytest.mark.parametrize(
    ("A", "X", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 2), ValueError, r"wanted \(4, 2\)"),
        (torch.ones(2, 3, 4), torch.ones(4, 2), ValueError, r"wanted \(2, 4, 2\)"),
        (torch.ones(3, 4), torch.ones(4), ValueError, "X must have at least 2 dimensions"),
        (torch.ones(3, 4), torch.ones(4, 2).double(), TypeError, "X is torch.float64"),
        (torch.ones(3, 4).long(), torch.ones(4, 2), TypeError, "A is torch.int64"),
        (torch.eye(4).to_sparse(), torch.ones(4, 2), TypeError, "A must be dense"),
        (torch.ones(3, 4), 3, TypeError, "X must be a tensor, got int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gram_matmul_bad_arguments(A, X, error, message):
    with pytest.raises(error, match=f"gram_matmul: .*{message}"):
        sm.linalg.gram_matmul(A, X)


def tail_matrix(m, n, name):
    r = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(s, r, dtype=torch.float64)).Q for s in (m, n))
    sigma = {
        "slow": torch.arange(1, r + 1, dtype=torch.float64) ** -0.5,
        "condition 1e12": torch.logspace(0, -12, r, dtype=torch.float64),
        "singular": torch.cat([torch.ones(r - 3), torch.zeros(3)]).double(),
        "gap": torch.cat([torch.linspace(2, 1, r - 4), torch.full((4,), 1e-3)]).double(),
        "flat": torch.ones(r, dtype=torch.float64),
    }
    return (left * sigma[name]) @ right.T


def verify_tail(A, rank, result):
    """Values, residuals, orthogonality and order against torch.linalg.svd in float64."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    A = exact(A)
    unit = A.abs().max().item() or 1.0
    A = A / unit
    U, S, Vh = (exact(t) for t in result)
    S = S / unit
    want = torch.linalg.svdvals(A)
    tolerance = 60 * UNIT[dtype] * (want[0].item() or 1.0)
    assert U.shape == (A.shape[0], rank)
    assert Vh.shape == (rank, A.shape[1])
    assert (result.S[1:] <= result.S[:-1]).all()
    assert (S - want[-rank:]).abs().max() <= tolerance
    assert departure(U) <= ORTHOGONAL[dtype]
    assert departure(Vh.T) <= ORTHOGONAL[dtype]
    for residual in (A @ Vh.T - U * S, A.T @ U - Vh.T * S):
        assert residual.norm(dim=0).max() <= tolerance
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@both
@pytest.mark.parametrize("name", ["slow", "condition 1e12", "singular", "gap", "flat"])
@pytest.mark.parametrize("shape", [(130, 90), (80, 110)], ids=["tall", "wide"])
def test_svd_tail(dtype, name, shape):
    A = tail_matrix(*shape, name).to(dtype)
    verify_tail(A, 5, sm.linalg.svd_tail(A, 5))


@both
@pytest.mark.parametrize("n", [40, 100, 300])
def test_svd_tail_singular_without_a_small_pivot(dtype, n):
    """sigma_n = 2^-n, and no pivot of the QR factor tells."""
    A = torch.eye(n, dtype=dtype) + 2 * torch.diag(torch.ones(n - 1, dtype=dtype), 1)
    verify_tail(A, 4, sm.linalg.svd_tail(A, 4))
    verify_tail(A.T, 4, sm.linalg.svd_tail(A.T, 4))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.float16, 100.0),
        (torch.bfloat16, 1e30),
    ],
    ids=str,
)
def test_svd_tail_types_and_scales(dtype, scale):
    A = (tail_matrix(70, 50, "slow") * scale).to(dtype)
    verify_tail(A, 3, sm.linalg.svd_tail(A, 3))


def test_svd_tail_on_each_back_end(backend):
    A = tail_matrix(50, 41, "gap").to(backend.device)
    result = sm.linalg.svd_tail(A, 4)
    verify_tail(A, 4, result)
    assert 0 < result.info.sweeps < 10
    assert result.info.rank == 4
    assert result.info.error < 1e-14
    full = sm.linalg.svd_tail(A, 41)
    verify_tail(A, 41, full)
    assert full.info.sweeps == 0
    verify_tail(torch.zeros(5, 3), 2, sm.linalg.svd_tail(torch.zeros(5, 3), 2))


@both
@pytest.mark.parametrize("name", ["slow", "singular", "gap"])
def test_svd_tail_by_torch(backend, dtype, name):
    """What CUDA tensors take."""
    A = tail_matrix(50, 41, name).to(dtype)
    result = _by_torch(A.to(backend.device), 4, 8, 0)
    verify_tail(A, 4, result)


def test_svd_tail_same_bits_for_any_number_of_threads(threads):
    for name in ("gap", "flat"):
        A = tail_matrix(1030, 120, name).float()
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sm.linalg.svd_tail(A, 4))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("A", "rank", "options", "error", "message"),
    [
        (torch.ones(4, 3), 4, {}, ValueError, "rank is 4, wanted 1 to 3"),
        (torch.ones(4, 3), 0, {}, ValueError, "rank is 0, wanted 1 to 3"),
        (torch.ones(4, 3), 1.5, {}, TypeError, "rank must be an integer"),
        (torch.ones(4, 3), torch.tensor(1), {}, TypeError, "rank must be an integer, got Tensor"),
        (torch.ones(4, 3, device="meta"), 1, {}, ValueError, "A is on meta"),
        (torch.ones(4, 3), 1, {"oversample": -1}, ValueError, "oversample is -1"),
        (torch.ones(4, 3), 1, {"seed": -1}, ValueError, "seed is -1"),
        (torch.ones(4), 1, {}, ValueError, "A must have 2 dimensions"),
        (torch.ones(0, 3), 1, {}, ValueError, "A is empty"),
        (torch.ones(4, 3).int(), 1, {}, TypeError, "A is torch.int32"),
        (torch.ones(4, 3, requires_grad=True), 1, {}, RuntimeError, "A requires grad"),
        (torch.full((4, 3), torch.nan), 1, {}, torch.linalg.LinAlgError, "NaN or Inf"),
        (torch.full((4, 3), torch.inf), 1, {}, torch.linalg.LinAlgError, "NaN or Inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_svd_tail_bad_arguments(A, rank, options, error, message):
    with pytest.raises(error, match=f"svd_tail: .*{message}"):
        sm.linalg.svd_tail(A, rank, **options)


def test_integers_of_numpy():
    A = sm.linalg.gaussian(9, 8, dtype=torch.float64)
    for kind in (np.int64, np.uint8):
        three, two = kind(3), kind(2)
        verify_tail(A, 3, sm.linalg.svd_tail(A, three, oversample=two, seed=two))
        for call in (
            lambda seed: sm.linalg.range_step(A, A[:8, :3], seed=seed),
            lambda seed: (sm.linalg.orthonormalize(A, seed=seed),),
        ):
            for got, wanted in zip(call(two), call(2), strict=True):
                assert torch.equal(got, wanted)
    with pytest.raises(TypeError, match="range_step: seed must be an integer, got Tensor"):
        sm.linalg.range_step(A, A[:8, :3], seed=torch.tensor(3))


def test_range_step_finds_the_subspace(backend):
    A = spectrum(40, 24, 12).to(backend.device)
    step = sm.linalg.range_step(A, sm.linalg.gaussian(24, 5, dtype=A.dtype, device=backend.device))
    for _ in range(5):
        step = sm.linalg.range_step(A, step.Q)
    U, S, _ = torch.linalg.svd(A.cpu())
    assert departure(step.P) <= 1e-13
    assert departure(step.Q) <= 1e-13
    torch.testing.assert_close(torch.linalg.svdvals(step.B.cpu()), S[:5], rtol=1e-5, atol=0)
    assert outside(step.P, U[:, :5]).max() < 1e-4
    torch.testing.assert_close(step.B, A.T @ step.P)


def test_range_step_types_batches_and_lists(backend, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    A = make(2, 30, 12, dtype=dtype, device=backend.device)
    Q = make(2, 12, 3, dtype=wide, device=backend.device)
    step = sm.linalg.range_step(A, Q)
    assert {t.dtype for t in step} == {wide}
    assert_close(step.B, exact(A).mT @ exact(step.P), terms=30)
    assert outside(step.P[1], exact(A[1]) @ exact(Q[1])).max() < 64 * UNIT[wide]
    other = make(7, 9, dtype=dtype, device=backend.device)
    found = sm.linalg.range_step([A[0], other], [Q[0], Q[0, :9, :2]])
    torch.testing.assert_close(found[0].Q, step.Q[0])
    assert found[1].P.shape == (7, 2)


@pytest.mark.parametrize("scale", [1e-24, 1e-36, 1e19, 1e30])
def test_range_step_scales(backend, scale):
    A = (spectrum(50, 30, 2) * scale).float().to(backend.device)
    Q = sm.linalg.gaussian(30, 4, device=backend.device)
    P, after, B = sm.linalg.range_step(A, Q)
    one = sm.linalg.range_step((A.double() / scale).float(), Q)
    torch.testing.assert_close(P, one.P, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, one.Q, rtol=0, atol=1e-3)
    torch.testing.assert_close(B.double() / scale, one.B.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("A", "Q", "error", "message"),
    [
        (torch.ones(5, 4), torch.ones(5, 2), ValueError, "A has shape"),
        (torch.ones(3, 4), torch.ones(4, 4), ValueError, "at most 3 columns"),
        (torch.ones(5, 4), torch.ones(4, 2).double(), TypeError, "Q is torch.float64"),
        (torch.ones(5, 4), [torch.ones(4, 2)], TypeError, "Q must be a tensor, got list"),
        ([torch.ones(5, 4)], [], ValueError, "list of 1, Q of 0"),
        ([torch.ones(5, 4)], [torch.ones(4)], ValueError, "item 0: Q must have at least 2"),
        (3, 4, TypeError, "tensors or lists of tensors"),
        (torch.ones(5, 4).to("meta"), torch.ones(4, 2).to("meta"), ValueError, "A is on meta"),
        (torch.ones(5, 4), torch.ones(4, 2, requires_grad=True), RuntimeError, "requires grad"),
        (torch.full((5, 4), torch.nan), torch.ones(4, 2), torch.linalg.LinAlgError, "NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_range_step_bad_arguments(A, Q, error, message):
    with pytest.raises(error, match=message):
        sm.linalg.range_step(A, Q)


def reference_step(A, Q):
    """In float64, with the signs of orthonormalize: a positive diagonal of R."""
    P, R = torch.linalg.qr(exact(A) @ exact(Q))
    P = P * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    B = exact(A).mT @ P
    after, R = torch.linalg.qr(B)
    return P, after * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :], B


@pytest.mark.parametrize("layout", LAYOUTS)
def test_range_step_of_each_type_and_layout(backend, dtype, layout):
    wide = torch.promote_types(dtype, torch.float32)
    A = [make(*s, dtype=dtype, device=backend.device, layout=layout) for s in ((35, 21), (9, 30))]
    Q = [make(*s, dtype=wide, device=backend.device, layout=layout) for s in ((21, 5), (30, 3))]
    kept = [t.clone() for t in (*A, *Q)]
    for step, a, q in zip(sm.linalg.range_step(A, Q), A, Q, strict=True):
        alone = sm.linalg.range_step(a, q)
        for found, same, want in zip(step, alone, reference_step(a, q), strict=True):
            assert torch.equal(found, same)
            assert_close(found, want, wide, terms=400)
    assert all(map(torch.equal, kept, (*A, *Q)))


def test_range_step_of_deficient_and_empty_matrices(backend):
    A = [torch.ones(20, 9), torch.zeros(6, 8), torch.randn(5, 7), torch.ones(0, 4)]
    Q = [sm.linalg.gaussian(a.shape[1], min(a.shape[0], 4)) for a in A]
    Q[2] = Q[2][:, :0]
    for a, step in zip(A, sm.linalg.range_step([a.to(backend.device) for a in A], Q), strict=True):
        assert departure(step.P) <= 1e-5 if step.P.numel() else True
        assert departure(step.Q) <= 1e-5 if step.Q.numel() else True
        torch.testing.assert_close(step.B, a.T @ step.P)
        torch.testing.assert_close(step.P @ step.B.T, a if step.P.numel() else 0 * a)
    assert sm.linalg.range_step([], []) == []


def test_range_step_names_what_is_not_finite(backend):
    A = [torch.randn(2, 8, 6, device=backend.device) for _ in range(3)]
    A[1][1, 7, 5] = torch.inf
    Q = [torch.ones(2, 6, 2, device=backend.device) for _ in range(3)]
    with pytest.raises(torch.linalg.LinAlgError, match=r"range_step: .*, in item 1$"):
        sm.linalg.range_step(A, Q)


def test_range_step_opcheck_and_compile():
    A, Q = torch.randn(9, 7), torch.randn(7, 2)
    torch.library.opcheck(torch.ops.structmat.range_step.default, ([A, A.T], [Q, A[:, :3]], 0))
    compiled = torch.compile(lambda A, Q: sm.linalg.range_step(A, Q), fullgraph=True)
    for found, want in zip(compiled(A, Q), sm.linalg.range_step(A, Q), strict=True):
        torch.testing.assert_close(found, want)
    nan = A.clone()
    nan[3, 3] = torch.nan
    assert compiled(nan, Q)[0].isnan().all()


def test_autocast_changes_nothing():
    """Decompositions keep their precision where layers are told to compute in bfloat16."""
    A, Q = torch.randn(60, 40), sm.linalg.gaussian(40, 5)
    Y = torch.randn(60, 6, requires_grad=True)

    def calls():
        result = sm.linalg.randomized_svd(A, 5, center=True)
        found = [*sm.linalg.svd_tail(A, 3), *sm.linalg.range_step(A, Q), *result]
        found += [*sm.linalg.randomized_svd(A, rtol=0.5), result.residuals(A, center=True)]
        weight = torch.arange(360.0).reshape(60, 6)
        found += torch.autograd.grad((sm.linalg.orthonormalize(Y) * weight).sum(), Y)
        X = Q.clone().requires_grad_()
        found += torch.autograd.grad((sm.linalg.gram_matmul(A, X) * Q).sum(), X)
        return found

    wanted = calls()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calls()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("shape", [(7000, 40), (300, 200)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, threads):
    for dtype in (torch.float32, torch.float64):
        A = torch.randn(shape, dtype=dtype)
        X = torch.randn(shape[1], 9, dtype=dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pair = sm.linalg.range_step([A, A[: shape[1]]], [X, X[:, :5]])
            results.append((sm.linalg.orthonormalize(A), sm.linalg.gram_matmul(A, X), *pair[1]))
            results[-1] += (*pair[0], *sm.linalg.gram_matmul(A, X, return_moments=True))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
