# SPDX-License-Identifier: Apache-2.0
"""Double-precision references, one per operator with its own signature; tolerances; test data.

References take tensors of any type and device and answer in float64 on the CPU, so that every back
end is compared with the same numbers.
"""

from collections.abc import Callable, Sequence

import torch

# Unit roundoff of each type: half the distance from 1 to the next number.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# Roundings of a result of this type, in units, allowed against the reference: the final one, that
# of 16-bit intermediates and the tail of the distribution over many elements.
ROUNDINGS = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 3.0, torch.float16: 3.0}

# (tokens, out features, in features, rank): ones, odd sizes, a tile and one more, an empty batch.
LINEAR_SIZES = [
    (1, 1, 1, 1),
    (1, 33, 65, 9),
    (3, 5, 7, 2),
    (16, 64, 48, 16),
    (17, 129, 65, 31),
    (67, 40, 130, 33),
    (0, 5, 7, 2),
]
LAYOUTS = ("contiguous", "slice", "transposed", "strided")


def make(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "slice",
    scale: float = 1.0,
    requires_grad: bool = False,
) -> torch.Tensor:
    """A normally distributed tensor in one of LAYOUTS; the values depend on torch's seed alone.

    Slices and strided tensors lie in a larger one whose other elements are NaN.
    """
    values = (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)
    if layout == "contiguous" or not shape:
        out = values.to(device)
    elif layout == "slice":
        base = torch.full([size + 3 for size in shape], torch.nan, dtype=dtype, device=device)
        out = base[tuple(slice(1, 1 + size) for size in shape)]
        out.copy_(values)
    elif layout == "transposed":
        out = values.to(device).movedim(-1, 0).contiguous().movedim(0, -1)
    elif layout == "strided":
        base = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype, device=device)
        out = base[..., ::2]
        out.copy_(values)
    else:
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
    return out.requires_grad_(requires_grad)


def exact(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers in float64 on the CPU."""
    return None if tensor is None else tensor.detach().cpu().double()


def assert_close(
    actual: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype | None = None,
    *,
    terms: int = 1,
    scale: float | None = None,
) -> None:
    """Asserts |actual - reference| <= rounding of `dtype` + rounding of a sum of `terms` products.

    Errors are measured against |reference| + its root mean square (or `scale`, where the reference
    is small by cancellation). Sums are kept in fp32, in fp64 for float64, and roundings in them add
    up as the square root of their number. NaN and Inf must be where the reference has them.
    """
    dtype = dtype or actual.dtype
    assert actual.dtype == dtype, f"got {actual.dtype}, wanted {dtype}"
    assert actual.shape == reference.shape, f"got {actual.shape}, wanted {reference.shape}"
    if actual.numel() == 0:
        return
    got, want = exact(actual), reference.detach().cpu().double()
    limit = torch.finfo(dtype).max
    want = torch.where(want.abs() > limit, want.sign() * torch.inf, want)
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places than the reference"
    assert torch.equal(got[want.isinf()], want[want.isinf()]), "Inf in other places"
    got, want = got[finite], want[finite]
    if want.numel() == 0:
        return
    size = want.abs() + (want.square().mean().sqrt() if scale is None else scale)
    summing = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    tolerance = (ROUNDINGS[dtype] * UNIT[dtype] + 4 * summing * max(terms, 1) ** 0.5) * size
    excess = (got - want).abs() / tolerance.clamp_min(torch.finfo(torch.float64).tiny)
    worst = excess.max().item()
    where = int(excess.argmax())
    assert worst <= 1, (
        f"error is {worst:.3g} times the tolerance of {dtype}: got {got[where]:.9g}, "
        f"wanted {want[where]:.9g} ({int((excess > 1).sum())} of {want.numel()} elements)"
    )


def gradients(
    function: Callable[..., torch.Tensor],
    arguments: Sequence[torch.Tensor | None],
    dy: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The reference's result and its gradients by every tensor argument, in float64."""
    leaves = [None if a is None else exact(a).requires_grad_() for a in arguments]
    y = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, exact(dy)))
    return y.detach(), [None if leaf is None else next(found) for leaf in leaves]


def low_rank_linear(
    x: torch.Tensor, U: torch.Tensor, V: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x (U V)^T + bias."""
    x, U, V = (a if a.dtype == torch.float64 else exact(a) for a in (x, U, V))
    y = x @ (U @ V).T
    return y if bias is None else y + (bias if bias.dtype == torch.float64 else exact(bias))


def sparse_low_rank_linear(
    x: torch.Tensor,
    U: torch.Tensor | None,
    V: torch.Tensor | None,
    S: torch.Tensor,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x (base + U V + S)^T + bias, S a dense matrix."""
    x, U, V, S, bias, base = (
        a if a is None or a.dtype == torch.float64 else exact(a) for a in (x, U, V, S, bias, base)
    )
    W = S if U is None or V is None else S + U @ V
    return activated(x @ (W if base is None else W + base).T, bias)


def monarch_linear(
    x: torch.Tensor,
    W1: torch.Tensor,
    W2: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    output: str = "blocked",
) -> torch.Tensor:
    """y = act(x W^T + bias), block (j, k) of W being W2[j,:,k,:] W1[k,j,:,:]."""
    x, W1, W2 = (a if a.dtype == torch.float64 else exact(a) for a in (x, W1, W2))
    (K, J), L = W1.shape[:2], W2.shape[1]
    rows = [torch.cat([W2[j, :, k] @ W1[k, j] for k in range(K)], 1) for j in range(J)]
    W = torch.cat(rows)
    if output == "interleaved":
        W = W[[j * L + i for i in range(L) for j in range(J)]]
    return activated(x @ W.T, bias, activation)


def kronecker_sparse_linear(
    x: torch.Tensor, factors: Sequence[torch.Tensor], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x (.. F_2 F_1)^T + bias."""
    x = x if x.dtype == torch.float64 else exact(x)
    for factor in factors:
        x = x @ kronecker_sparse_matrix(factor).T
    return activated(x, bias, "none")


def kronecker_sparse_matrix(W: torch.Tensor) -> torch.Tensor:
    """The matrix of a factor (a, b, c, d): c entries in each row, d apart."""
    W = W if W.dtype == torch.float64 else exact(W)
    a, b, c, d = W.shape
    one_a, one_d = (torch.eye(size, dtype=torch.float64) for size in (a, d))
    dense = torch.einsum("abcd,ai,dj->abdicj", W, one_a, one_d)
    return dense.reshape(a * b * d, a * c * d)


def activated(z: torch.Tensor, bias: torch.Tensor | None, activation: str = "none") -> torch.Tensor:
    if bias is not None:
        z = z + (bias if bias.dtype == torch.float64 else exact(bias))
    if activation == "relu":
        return z.clamp_min(0)
    if activation == "gelu":
        return z * torch.special.ndtr(z)
    return z * torch.sigmoid(z) if activation == "silu" else z


def gram_matmul(A: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Z = A^T (A X)."""
    A, X = (a if a.dtype == torch.float64 else exact(a) for a in (A, X))
    A, X = A.cpu(), X.cpu()
    return A.mT @ (A @ X)


def streamed_rows(
    rows: torch.Tensor, decay: float = 1.0, center: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix that a stream of rows stands for, and their mean: row i of N has the weight
    decay^(N - i)."""
    A = exact(rows)
    weight = decay ** torch.arange(len(A) - 1, -1, -1, dtype=torch.float64)[:, None]
    mean = (weight.square() * A).sum(0) / weight.square().sum()
    return weight * (A - mean if center else A), mean
