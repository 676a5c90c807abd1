# SPDX-License-Identifier: Apache-2.0
"""Gradients of sm.linalg.randomized_svd against autograd of torch.linalg.svd, truncated."""

import warnings

import pytest
import torch

import structmat as sm
from structmat.linalg import svd_gradient

LOSSES = {
    "U": lambda U, S, Vh, w: (U * w[: U.shape[0], : U.shape[1]]).sum(),
    "S": lambda U, S, Vh, w: (S.square() * w[0, : len(S)]).sum(),
    "Vh": lambda U, S, Vh, w: (Vh * w[: Vh.shape[0], : Vh.shape[1]]).sum(),
    "first U": lambda U, S, Vh, w: (U[:, 0] * w[: U.shape[0], 0]).sum(),
    "product": lambda U, S, Vh, w: ((U * S) @ Vh * w[: U.shape[0], : Vh.shape[1]]).sum(),
    "projector": lambda U, S, Vh, w: (U @ U.T * w[: U.shape[0], : U.shape[0]]).sum(),
    "all": lambda U, S, Vh, w: (U * S).exp().sum() + (Vh * w[0, : Vh.shape[1]]).cos().sum(),
}
INVARIANT = ["S", "product", "projector"]  # do not depend on how equal singular values are split


def matrix(m, n, sigma):
    """A matrix of these singular values."""
    r = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(size, r, dtype=torch.float64)).Q for size in (m, n))
    return (left * sigma) @ right.T


def gapped(m, n, k):
    """Singular values that fall slowly, but for a gap after k."""
    sigma = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.5
    sigma[k:] *= 0.6
    return matrix(m, n, sigma)


def truncated(A, k):
    """The truncated SVD from the full one, whose gradient torch knows, with our signs."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign().detach()
    return (U * sign)[:, :k], S[:k], (Vh * sign.T)[:k]


def gradient(loss, A, decompose):
    A = A.detach().requires_grad_()
    factors = decompose(A)
    w = torch.randn(99, 99, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.autograd.grad(loss(*factors, w.to(factors[0])), A)[0]


def exact(A, k):
    """With a complete basis, hence vectors good to rounding."""
    return sm.linalg.randomized_svd(A, k, oversample=min(A.shape[-2:]))


@pytest.fixture(params=["direct", "iterative"])
def solver(request, monkeypatch):
    """Small matrices are solved directly; with these bounds the Krylov space is not the whole."""
    if request.param == "iterative":
        monkeypatch.setattr(svd_gradient, "_BASIS", 4)
        monkeypatch.setattr(svd_gradient, "_WIDTH", 2)
    return request.param


@pytest.mark.parametrize(
    ("m", "n", "k"), [(6, 5, 2), (5, 6, 2), (5, 5, 5), (4, 6, 4), (1, 3, 1), (3, 1, 1)]
)
def test_gradcheck(m, n, k):
    A = gapped(m, n, k).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: tuple(sm.linalg.randomized_svd(A, k)), (A,))


def test_gradcheck_of_a_batch():
    A = torch.stack([gapped(4, 3, 2) for _ in range(4)]).unflatten(0, (2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda A: tuple(sm.linalg.randomized_svd(A, 2)), (A,), fast_mode=True
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=["tall", "wide"])
def test_against_the_full_decomposition(shape, loss, solver):
    A = gapped(*shape, 5)
    wanted = gradient(LOSSES[loss], A, lambda A: truncated(A, 5))
    found = gradient(LOSSES[loss], A, lambda A: exact(A, 5))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11 * wanted.norm().item())


def assert_precise(A, device, loss):
    wanted = gradient(loss, A.double(), lambda A: truncated(A, 3))
    found = gradient(loss, A.to(device), lambda A: exact(A, 3))
    assert found.dtype == A.dtype
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(A.dtype, 2 * torch.finfo(A.dtype).eps)
    assert (found.cpu().double() - wanted).norm() <= bound * wanted.norm()


def test_precision_of_every_back_end(backend, dtype):
    assert_precise(gapped(13, 9, 3).to(dtype), backend.device, LOSSES["all"])


@pytest.mark.parametrize("loss", LOSSES)
def test_precision(dtype, loss):
    assert_precise(gapped(60, 50, 3).to(dtype), "cpu", LOSSES[loss])


@pytest.mark.parametrize("rows", [70, 300])
def test_error_falls_with_the_error_of_the_vectors(rows):
    """On a matrix too large to be solved directly, at default and more sweeps."""
    A = matrix(rows, 200, torch.exp(-torch.arange(min(rows, 200), dtype=torch.float64) / 8))
    w = torch.randn(rows, 5, dtype=torch.float64)

    def gradient(decompose):
        leaf = A.clone().requires_grad_()
        return torch.autograd.grad((decompose(leaf)[0] * w).sum(), leaf)[0]

    wanted = gradient(lambda A: truncated(A, 5))
    for sweeps, bound in ((5, 1e-3), (13, 1e-11)):
        found = gradient(lambda A, sweeps=sweeps: sm.linalg.randomized_svd(A, 5, sweeps=sweeps))
        assert (found - wanted).norm() <= bound * wanted.norm()


def test_close_values_at_the_end_are_resolved():
    """A gap of 1e-4 after k: thousands of plain iterations, a few with the neighbours deflated."""
    sigma = torch.linspace(1, 0.1, 150, dtype=torch.float64)
    sigma[6] = sigma[5] * (1 - 1e-4)
    A = matrix(200, 150, sigma)
    U, S, Vh = truncated(A, 6)
    w = torch.randn(200, 6, dtype=torch.float64)
    found = torch.ops.structmat.randomized_svd_backward(A, U, S, Vh, w, None, None, False)
    leaf = A.clone().requires_grad_()
    wanted = torch.autograd.grad((truncated(leaf, 6)[0] * w).sum(), leaf)[0]
    assert (found - wanted).norm() <= 1e-9 * wanted.norm()


@pytest.mark.parametrize("loss", INVARIANT)
@pytest.mark.parametrize("distance", [1e-6, 1e-11])
def test_close_values_inside(loss, distance):
    """Two kept values next to each other: torch's own gradient loses digits or all of them."""
    sigma = torch.tensor([1, 0.8, 0.8 - distance, 0.5, 0.1, 0.05], dtype=torch.float64)
    left, right = torch.linalg.qr(torch.randn(9, 6).double()).Q, torch.eye(6).double()

    def at(sigma):
        return gradient(LOSSES[loss], (left * sigma) @ right.T, lambda A: exact(A, 4))

    apart = sigma.clone()
    apart[2] = 0.8 - 1e-4  # where the plain formula holds
    limit = gradient(LOSSES[loss], (left * apart) @ right.T, lambda A: truncated(A, 4))
    assert (at(sigma) - limit).norm() <= 2e-3 * limit.norm()


DEGENERATE = {
    "identity": torch.eye(40),
    "zero": torch.zeros(40, 30),
    "rank 2": torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    @ torch.randn(2, 40, generator=torch.Generator().manual_seed(2)),
    "equal pairs": torch.diag(torch.tensor([3.0, 2, 2, 1, 1, 1, *[0.5] * 34])),
    "huge": 1e30 * torch.diag(torch.arange(40.0, 0, -1)),
    "tiny": 1e-30 * torch.diag(torch.arange(40.0, 0, -1)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.filterwarnings("ignore:randomized_svd. the gradient of U and Vh is not determined")
def test_degenerate_matrices_have_finite_gradients(name, loss, solver):
    if (name, loss) == ("huge", "all"):
        pytest.skip("the loss itself is infinite")
    grad = gradient(LOSSES[loss], DEGENERATE[name], lambda A: sm.linalg.randomized_svd(A, 5))
    assert grad.isfinite().all()


def test_rank_below_k():
    """Of the product, the gradient at a matrix of rank 2 is that of the identity function but for
    what is outside both its row and column space."""
    left, right = (torch.linalg.qr(torch.randn(size, 2).double()).Q for size in (50, 40))
    A = (left * torch.tensor([2.0, 1.0])) @ right.T
    w = torch.randn(50, 40, dtype=torch.float64)
    leaf = A.clone().requires_grad_()
    U, S, Vh = sm.linalg.randomized_svd(leaf, 5)
    grad = torch.autograd.grad(((U * S) @ Vh * w).sum(), leaf)[0]
    for projected in (left.T @ grad - left.T @ w, (grad - w) @ right):
        assert projected.norm() <= 1e-10 * w.norm()


def test_no_gap_is_reported():
    A = torch.diag(torch.tensor([3.0, 2, 2, *[0.1] * 37])).requires_grad_()
    U, S, _ = sm.linalg.randomized_svd(A, 2)
    with pytest.warns(UserWarning, match="the gradient of U and Vh is not determined"):
        grad = torch.autograd.grad((U[4] + U[2]).sum(), A, retain_graph=True)[0]
    assert grad.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(U[:, 0].sum() + S.sum(), A)  # do not depend on where the cut is


def test_values_alone_need_no_product_with_the_matrix(monkeypatch):
    monkeypatch.setattr(svd_gradient, "_product", lambda *_: pytest.fail("a product with A"))
    A = gapped(50, 40, 3).requires_grad_()
    U, S, Vh = sm.linalg.randomized_svd(A, 3)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    grad = torch.autograd.grad(S @ weights, A)[0]
    torch.testing.assert_close(grad, (U * weights) @ Vh, rtol=1e-12, atol=1e-12)


def test_centered():
    """The backward operator of A - mean, given its decomposition."""
    A = gapped(30, 20, 3) + 5
    w = torch.randn(30, 3, dtype=torch.float64)
    leaf = A.clone().requires_grad_()
    factors = truncated(leaf - leaf.mean(0), 3)
    wanted = torch.autograd.grad((factors[0] * w).sum(), leaf)[0]
    U, S, Vh = (t.detach() for t in factors)
    found = torch.ops.structmat.randomized_svd_backward(A, U, S, Vh, w, None, None, True)
    assert (found - wanted).norm() <= 1e-11 * wanted.norm()


def test_nan_in_the_incoming_gradient_goes_on():
    A = gapped(60, 50, 3).requires_grad_()
    U, _, _ = sm.linalg.randomized_svd(A, 3)
    grad = torch.autograd.grad(U, A, torch.full_like(U, torch.nan))[0]
    assert grad.isnan().any()


def test_second_derivatives_are_refused():
    A = gapped(6, 5, 2).requires_grad_()
    grad = torch.autograd.grad(sm.linalg.randomized_svd(A, 2).S.sum(), A, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="there are no second derivatives"):
        grad.sum().backward()


def test_facts_have_no_gradient():
    A = gapped(6, 5, 2).requires_grad_()
    *_, facts = torch.ops.structmat.randomized_svd(A, 2, None, None, 0, False)
    assert not facts.requires_grad
    assert isinstance(sm.linalg.randomized_svd(A, 2).info.error, float)


def test_compile(backend):
    def loss(A):
        U, S, Vh = sm.linalg.randomized_svd(A, 3)
        return ((U * S) @ Vh).square().sum() + U[0].sum()

    A = gapped(12, 9, 3).to(backend.device).requires_grad_()
    wanted = torch.autograd.grad(loss(A), A)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(A), A)[0], wanted)


def test_opcheck():
    A = gapped(12, 9, 3)
    factors = truncated(A, 3)
    like = [torch.randn_like(t) for t in factors]
    torch.library.opcheck(
        torch.ops.structmat.randomized_svd_backward.default, (A, *factors, *like, False)
    )
    A.requires_grad_()
    torch.library.opcheck(torch.ops.structmat.randomized_svd.default, (A, 3, None, None, 0, False))


@pytest.mark.parametrize("k", [2, 3])
def test_equal_values_at_the_cut_stay_finite(k):
    """Vectors found to 1e-7 do not tell equal values apart: a warning, and no huge numbers."""
    n = 200
    sigma = torch.cat([torch.tensor([1.0, 0.5, 0.5, 0.5]), 0.1 * 0.9 ** torch.arange(n - 4.0)])
    left, right = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q for m in (n + 5, n))
    A = ((left * sigma.double()) @ right.T).requires_grad_()
    U, _, _ = sm.linalg.randomized_svd(A, k)
    with pytest.warns(UserWarning, match="not determined"):
        (grad,) = torch.autograd.grad(((U @ U.T) * torch.randn(n + 5, n + 5).double()).sum(), A)
    assert grad.isfinite().all()
    assert grad.abs().max() < 1e5
