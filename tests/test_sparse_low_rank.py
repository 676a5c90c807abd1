# SPDX-License-Identifier: Apache-2.0
"""Products with sparse weights plus low rank: values and gradients against float64."""

import subprocess
import sys

import pytest
import reference
import torch
from conftest import Backend
from reference import LAYOUTS, assert_close, make

import structmat as sm

FAMILIES = ("uniform", "columns", "vector16", "block16")
# (tokens, out, in, rank, density): one of each, odd sizes, several strips, none of each.
SIZES = [
    (1, 1, 1, 1, 1.0),
    (1, 33, 50, 9, 0.3),
    (5, 37, 23, 4, 0.3),
    (41, 50, 58, 7, 0.1),
    (9, 20, 33, 3, 1.0),
    (7, 20, 33, 3, 0.0),
    (7, 20, 33, 0, 0.2),
    (0, 20, 33, 3, 0.2),
    (3, 0, 5, 2, 0.5),
    (3, 5, 0, 2, 0.5),
]


def arguments(size, family, dtype, device, requires_grad=False, layout="slice"):
    """x, U, V, values, bias, base and the pattern."""
    tokens, m, n, r, density = size
    pattern = sm.SparsePattern.random(m, n, density, family=family, seed=1, device=device)
    per_row = max(pattern.nnz / max(m, 1), 1.0)
    shapes = [(tokens, n), (m, r), (r, n), (pattern.nnz,), (m,), (m, n)]
    scales = [1.0, max(r, 1) ** -0.5, max(n, 1) ** -0.5, per_row**-0.5, 1.0, max(n, 1) ** -0.5]
    made = [
        make(*shape, dtype=dtype, device=device, scale=scale, layout=layout)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return [a.requires_grad_(requires_grad) for a in made[:5]] + [made[5], pattern]


def product(x, U, V, values, bias, base, pattern):
    return sm.ops.sparse_low_rank_linear(x, U, V, pattern, values, bias, base=base)


def wanted(args, dy):
    """The reference's result and gradients; the values' are those of S on the support."""
    x, U, V, values, bias, base, pattern = args
    x, U, V, bias = (reference.exact(a).requires_grad_() for a in (x, U, V, bias))
    mask = pattern.to_mask().cpu()
    S = torch.zeros(mask.shape, dtype=torch.float64)
    S[mask] = reference.exact(values)  # the order of values is row by row
    S.requires_grad_()
    y = reference.sparse_low_rank_linear(x, U, V, S, bias, reference.exact(base))
    dx, dU, dV, dS, dbias = torch.autograd.grad(y, (x, U, V, S, bias), reference.exact(dy))
    return y.detach(), [dx, dU, dV, dS[mask], dbias]


def scale_of(want: torch.Tensor) -> float:
    return max(1.0, want.square().mean().sqrt().item()) if want.numel() else 1.0


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_gradients(backend: Backend, dtype: torch.dtype, family: str, size) -> None:
    if backend.name == "cuda-emulated" and size[0] > 9 and dtype != torch.bfloat16:
        pytest.skip("the emulator is slow")
    args = arguments(size, family, dtype, backend.device, requires_grad=True)
    x, *weights, _, pattern = args
    dy = make(size[0], size[1], dtype=dtype, device=backend.device)
    want, grads = wanted(args, dy)
    y = product(*args)
    terms = size[2] + size[3]
    assert_close(y.detach(), want, dtype, terms=terms, scale=scale_of(want))
    with torch.no_grad():
        assert_close(product(*args), want, dtype, terms=terms, scale=scale_of(want))
    for a, b in zip(torch.autograd.grad(y, [x, *weights], dy), grads, strict=True):
        assert_close(a, b, dtype, terms=sum(size[:4]), scale=scale_of(b))
    sampled = sm.ops.sampled_matmul(dy, x.detach(), pattern)
    assert_close(sampled, grads[3], dtype, terms=size[0], scale=scale_of(grads[3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_more_columns_than_a_slab(family: str) -> None:
    args = arguments((40, 20, 9000, 2, 0.02), family, torch.float32, "cpu", requires_grad=True)
    dy = make(40, 20)
    want, grads = wanted(args, dy)
    y = product(*args)
    assert_close(y.detach(), want, terms=9000, scale=scale_of(want))
    for a, b in zip(torch.autograd.grad(y, args[:5], dy), grads, strict=True):
        assert_close(a, b, terms=9000, scale=scale_of(b))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("uniform", (1, 33, 50, 9, 0.3)),
        ("columns", (9, 20, 33, 3, 0.3)),
        ("vector16", (9, 37, 23, 0, 0.3)),
        ("uniform", (70, 130, 1100, 3, 0.02)),
        ("uniform", (5, 20, 0, 3, 0.5)),
    ],
    ids=str,
)
def test_a_base_of_16_bits_beside_float32(
    backend: Backend, narrow: torch.dtype, family: str, size
) -> None:
    if backend.name == "cuda-emulated" and (size[0] > 9 or narrow != torch.bfloat16):
        pytest.skip("the emulator is slow")
    args = arguments(size, family, torch.float32, backend.device, requires_grad=True)
    args[5] = args[5].to(narrow)
    dy = make(size[0], size[1], device=backend.device)
    want, grads = wanted(args, dy)
    y = product(*args)
    assert y.dtype == torch.float32
    terms = size[2] + size[3]
    assert_close(y.detach(), want, terms=terms, scale=scale_of(want))
    with torch.no_grad():
        assert_close(product(*args), want, terms=terms, scale=scale_of(want))
    for a, b in zip(torch.autograd.grad(y, args[:5], dy), grads, strict=True):
        assert_close(a, b, terms=sum(size[:4]), scale=scale_of(b))
    assert args[5].dtype == narrow

    def second(base):
        leaves, at = args[:5], torch.ones_like(dy, requires_grad=True)
        y = product(*leaves, base, args[6])
        first = torch.autograd.grad(y, leaves, at, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [*leaves[:4], at])

    for a, b in zip(second(args[5]), second(args[5].float()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * scale_of(b))


@pytest.mark.parametrize("wanted_ones", [1, 2, 4, 8, 16, 9, 6, 27])
def test_only_the_gradients_asked_for(backend: Backend, wanted_ones: int) -> None:
    args = arguments((7, 19, 13, 5, 0.3), "uniform", torch.float64, backend.device)
    needs = [bool(wanted_ones >> i & 1) for i in range(5)]
    for a, need in zip(args, needs, strict=False):
        a.requires_grad_(need)
    dy = make(7, 19, dtype=torch.float64, device=backend.device)
    product(*args).backward(dy)
    _, grads = wanted(args, dy)
    for a, b, need in zip(args, grads, needs, strict=False):
        assert (a.grad is not None) == need
        if need:
            assert_close(a.grad, b, torch.float64, terms=44)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_leading_dimensions(backend: Backend, layout: str) -> None:
    size = (6, 18, 20, 3, 0.3)
    args = arguments(size, "vector16", torch.float32, backend.device, True, layout)
    dy = make(6, 18, device=backend.device, layout=layout)
    want, grads = wanted(args, dy)
    for shape in ((6,), (2, 3), (3, 1, 2)):
        x = args[0].reshape(*shape, 20)
        y = product(x, *args[1:])
        assert y.shape == (*shape, 18)
        for a, b in zip(torch.autograd.grad(y, args[:5], dy.reshape(y.shape)), grads, strict=True):
            assert_close(a, b, terms=50, scale=scale_of(b))
    one = sm.ops.sparse_linear(args[0][0], args[6], args[3])
    assert one.shape == (18,)
    assert sm.ops.sampled_matmul(dy[0], args[0][0].detach(), args[6]).shape == (args[6].nnz,)
    assert_close(y.detach().reshape(6, 18), want, terms=30, scale=scale_of(want))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("family", ["uniform", "columns"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_number_that_is_not_finite(
    backend: Backend, family: str, value: float, tokens: int
) -> None:
    """Its token is NaN in every output, as the zeros of a dense S make it."""
    args = arguments((tokens, 18, 20, 0, 0.1), family, torch.float32, backend.device)
    args[0][1, 7] = value
    y = sm.ops.sparse_linear(args[0], args[6], args[3], args[4]).cpu()
    S = args[6].scatter(args[3]).cpu()
    dense = args[0].cpu() @ S.T + args[4].cpu()
    assert torch.equal(y.isfinite(), dense.isfinite())
    zero = ~args[6].to_mask().cpu()[:, 7]
    assert y[1][zero].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck(backend: Backend, family: str) -> None:
    for size in [(3, 5, 18, 2, 0.2), (2, 3, 4, 0, 0.5)]:
        *args, base, pattern = arguments(size, family, torch.float64, backend.device, True)

        def f(*a, base=base, pattern=pattern):
            return product(*a, base, pattern)

        assert torch.autograd.gradcheck(f, args)
        assert torch.autograd.gradgradcheck(f, args)
        for which in range(5):  # each alone: what is saved for one need not serve the others
            leaves = [a.detach().requires_grad_(i == which) for i, a in enumerate(args)]
            assert torch.autograd.gradgradcheck(f, leaves)
        dy = make(size[0], size[1], dtype=torch.float64, device=backend.device, requires_grad=True)

        def g(dy, x, pattern=pattern):
            return sm.ops.sampled_matmul(dy, x, pattern)

        assert torch.autograd.gradcheck(g, (dy, args[0]))
        assert torch.autograd.gradgradcheck(g, (dy, args[0]))


def test_transforms_and_forward_mode() -> None:
    args = arguments((6, 5, 7, 3, 0.4), "uniform", torch.float64, "cpu")
    x, U, V, values, bias, base, pattern = args
    tangents = tuple(torch.randn_like(a) for a in args[:4])

    def derivatives(f):
        return [
            *torch.func.jvp(f, (x, U, V, values), tangents),
            torch.func.grad(lambda v: f(x, U, V, v).square().sum())(values),
            torch.func.hessian(lambda v: f(x, U, V, v).square().sum())(values),
            torch.func.vmap(f, (0, None, None, None))(x.reshape(2, 3, 7), U, V, values),
        ]

    def dense(x, U, V, v):
        return x @ (base + U @ V + pattern.scatter(v)).T + bias

    got = derivatives(lambda x, U, V, v: product(x, U, V, v, bias, base, pattern))
    for a, e in zip(got, derivatives(dense), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["uniform", "block16"])
def test_opcheck(family: str) -> None:
    ops = torch.ops.structmat
    args = arguments((3, 18, 20, 2, 0.3), family, torch.float32, "cpu", layout="contiguous")
    x, U, V, values, bias, base, pattern = args
    index = pattern.starts, pattern.columns
    for low_rank, keep in (((U, V), True), ((U, V), False), ((None, None), False)):
        torch.library.opcheck(
            ops.sparse_low_rank_linear.default,
            (x, *low_rank, *index, 18, 20, pattern.group, values, bias, base, keep),
        )
    dy, h = make(3, 18), make(3, 2)
    other, permutation = pattern.transpose()
    transposed = other.starts, other.columns, permutation, 1
    backward = ops.sparse_low_rank_linear_backward.default
    weights = U, V, *index, 18, 20, pattern.group, values, base
    torch.library.opcheck(backward, (dy, x, *weights, *transposed, h, True, True, True, True))
    none = None, None, None, 1, None
    torch.library.opcheck(backward, (dy, x, *weights, *none, False, False, True, False))
    like = 18, 20, pattern.group, pattern.nnz
    torch.library.opcheck(ops.sampled_matmul.default, (dy, x, *index, *like))
    torch.library.opcheck(ops.sparse_transpose.default, (*index, *like))
    torch.library.opcheck(ops.random_subsets.default, (index[0], 2, 9, 3, 1))


@pytest.mark.parametrize("which", [[0, 1, 2, 3, 4], [3], [0]], ids=str)
def test_compile(backend: Backend, which: list[int]) -> None:
    torch.compiler.reset()
    args = arguments((5, 18, 20, 2, 0.3), "vector16", torch.float32, backend.device)
    leaves = [args[i].requires_grad_() for i in which]
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    dy = make(5, 18, device=backend.device)
    got = torch.autograd.grad(compiled(*args), leaves, dy)  # computes the transposed pattern
    again = torch.autograd.grad(compiled(*args), leaves, dy)
    want = torch.autograd.grad(product(*args), leaves, dy)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_autocast(backend: Backend) -> None:
    args = arguments((5, 18, 20, 2, 0.3), "columns", torch.float32, backend.device, True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        y = product(*args)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, product(*(a.bfloat16() for a in args[:6]), args[6]))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), args[:5]))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_for_any_number_of_threads(family: str, threads: int) -> None:
    for tokens in (1, 9, 150):
        args = arguments((tokens, 200, 300, 40, 0.1), family, torch.float32, "cpu", True)
        dy = make(tokens, 200)
        results = []
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            y = product(*args)
            results.append([y, *torch.autograd.grad(y, args[:5], dy)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("tokens", [1, 2])
def test_same_bits_where_a_task_ends_with_one_row_of_a_group(tokens: int, threads: int) -> None:
    pattern = sm.SparsePattern.random(33, 16384, 0.5, family="columns", seed=1)
    x, values = make(tokens, 16384), make(pattern.nnz)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(sm.ops.sparse_linear(x, pattern, values))
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_training_step() -> None:
    """T (m + n + 2 r) + r (m + n) + 4 nnz numbers beyond x: below the dense weight alone."""
    code = r"""
import re, torch, structmat as sm
T, m, n, r = 256, 3072, 3072, 32
torch.set_num_threads(1)
pattern = sm.SparsePattern.random(m, n, 0.02)
pattern.transpose()
def status(name):
    return int(re.search(name + r":\s+(\d+)", open("/proc/self/status").read())[1])
def step(T, base):
    x, dy = torch.ones(T, n, requires_grad=True), torch.ones(T, m)
    shapes = (m, r), (r, n), (pattern.nnz,), (m,)
    U, V, values, bias = (torch.full(shape, 0.1, requires_grad=True) for shape in shapes)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    sm.ops.sparse_low_rank_linear(x, U, V, pattern, values, bias, base=base).backward(dy)
    return (status("VmHWM") - before) * 256  # numbers of 4 bytes
narrow = torch.ones(m, n, dtype=torch.bfloat16)
step(8, narrow)
print(step(T, None), step(T, narrow), T * (m + n + 2 * r) + r * (m + n) + 4 * pattern.nnz, m * n)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *used, allowed, dense = map(int, done.stdout.split())
    assert allowed < dense
    assert max(used) <= allowed, f"{max(used) / allowed:.2f} of what is allowed"


GOOD = {"x": torch.ones(3, 6), "U": torch.ones(4, 2), "V": torch.ones(2, 6)}
PATTERN = sm.SparsePattern.random(4, 6, 0.25)
BAD = [
    (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    (TypeError, "U must be a tensor, got NoneType", {"U": None}),
    (TypeError, "pattern must be a SparsePattern, got Tensor", {"pattern": torch.ones(4, 6)}),
    (TypeError, "x is torch.int64, wanted one of", {"x": torch.ones(3, 6).long()}),
    (
        TypeError,
        "values is torch.float64, wanted torch.float32",
        {"values": torch.ones(6).double()},
    ),
    (ValueError, "values is on meta, x on cpu", {"values": torch.ones(6, device="meta")}),
    (ValueError, "the pattern is on meta, x on cpu", {"pattern": PATTERN.to("meta")}),
    (ValueError, "x has 7 columns, the pattern 4 x 6 takes 6", {"x": torch.ones(3, 7)}),
    (ValueError, r"U is \(5, 2\) and V \(2, 6\), the pattern 4 x 6", {"U": torch.ones(5, 2)}),
    (ValueError, r"U \(4, 3\) has rank 3, V \(2, 6\) 2", {"U": torch.ones(4, 3)}),
    (ValueError, r"values is \(7,\), wanted \(6,\) for the pattern", {"values": torch.ones(7)}),
    (ValueError, r"bias has shape \(5,\), wanted \(4,\)", {"bias": torch.ones(5)}),
    (ValueError, r"base is \(6, 4\), wanted \(4, 6\)", {"base": torch.ones(6, 4)}),
    (
        TypeError,
        "base is torch.float64, wanted torch.float32 as x or torch.bfloat16 or torch.float16",
        {"base": torch.ones(4, 6).double()},
    ),
    (
        ValueError,
        "base is on meta, x on cpu",
        {"base": torch.ones(4, 6, dtype=torch.bfloat16, device="meta")},
    ),
    (ValueError, "base is frozen", {"base": torch.ones(4, 6, requires_grad=True)}),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(error, message: str, change: dict, grad: bool) -> None:
    values = torch.ones(6, requires_grad=grad)
    given = {**GOOD, "pattern": PATTERN, "values": values, "bias": None, "base": None, **change}
    with pytest.raises(error, match=f"sparse_low_rank_linear: {message}"):
        sm.ops.sparse_low_rank_linear(**given)


def test_bad_arguments_of_the_others() -> None:
    dy, x = torch.ones(3, 4), torch.ones(3, 6)
    with pytest.raises(ValueError, match=r"sampled_matmul: dy is \(2, 4\) and x \(3, 6\)"):
        sm.ops.sampled_matmul(dy[:2], x, PATTERN)
    with pytest.raises(ValueError, match=r"sampled_matmul: dy is \(3, 6\)"):
        sm.ops.sampled_matmul(x, x, PATTERN)
    with pytest.raises(TypeError, match=r"sampled_matmul: x is torch\.float64"):
        sm.ops.sampled_matmul(dy, x.double(), PATTERN)
    with pytest.raises(ValueError, match="sampled_matmul: x is on meta"):
        sm.ops.sampled_matmul(dy, x.to("meta"), PATTERN)
    with pytest.raises(ValueError, match=r"sparse_linear: values is \(3,\)"):
        sm.ops.sparse_linear(x, PATTERN, torch.ones(3))
    for given in (PATTERN.to("meta"), PATTERN):
        values = torch.ones(6, device="meta" if given is PATTERN else "cpu")
        with pytest.raises(ValueError, match="is on meta, x on cpu"):
            sm.ops.sparse_linear(x, given, values)
    with pytest.raises(ValueError, match="the pattern is on meta, dy on cpu"):
        sm.ops.sampled_matmul(dy, x, PATTERN.to("meta"))
    with pytest.raises(ValueError, match="x must have at least 1 dimension"):
        sm.ops.sparse_linear(torch.tensor(1.0), PATTERN, torch.ones(6))
    with pytest.raises(TypeError, match=r"x is torch.float32, wanted torch.float64 as dy"):
        sm.ops.sampled_matmul(dy.double(), x, PATTERN)
    op, index = torch.ops.structmat.sparse_low_rank_linear, (PATTERN.starts, PATTERN.columns)
    with pytest.raises(RuntimeError, match="starts has 5 elements, wanted 6"):
        op(x, None, None, *index, 5, 6, 1, torch.ones(6), None, None, False)
    with pytest.raises(RuntimeError, match="5 values do not fit 6 columns"):
        op(x, None, None, *index, 4, 6, 1, torch.ones(5), None, None, False)
    with pytest.raises(RuntimeError, match="U and V are given together"):
        op(x, GOOD["U"], None, *index, 4, 6, 1, torch.ones(6), None, None, False)
    # What differs by less than a slab shows in no size of the index.
    with pytest.raises(RuntimeError, match=r"x is \(3, 7\), wanted \(3, 6\)"):
        op(torch.ones(3, 7), None, None, *index, 4, 6, 1, torch.ones(6), None, None, False)
    sampled = torch.ops.structmat.sampled_matmul
    with pytest.raises(RuntimeError, match=r"x is \(3, 7\), wanted \(3, 6\)"):
        sampled(dy, torch.ones(3, 7), *index, 4, 6, 1, 6)
    with pytest.raises(RuntimeError, match=r"dy is \(3, 3\), wanted \(3, 4\)"):
        sampled(dy[:, :3], x, *index, 4, 6, 1, 6)
