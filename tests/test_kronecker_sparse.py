# SPDX-License-Identifier: Apache-2.0
"""kronecker_sparse_linear and block_diagonal_linear against float64, on every back end."""

from itertools import product

import pytest
import reference
import torch
from conftest import Backend
from reference import LAYOUTS, assert_close, gradients, make

import structmat as sm

# (tokens, factors): one factor of each kind, none of each size, pairs that run as one Monarch
# product and others, longer chains.
SINGLE = [
    (1, [(1, 1, 1, 1)]),
    (3, [(3, 5, 4, 1)]),
    (19, [(1, 7, 9, 1)]),
    (5, [(1, 3, 4, 5)]),
    (18, [(2, 7, 3, 17)]),
    (0, [(2, 3, 4, 2)]),
    (4, [(0, 3, 4, 2)]),
    (4, [(2, 0, 4, 2)]),
    (4, [(2, 3, 0, 2)]),
    (4, [(2, 3, 4, 0)]),
]
CHAINS = [
    (3, [(4, 6, 5, 1), (1, 7, 8, 3)]),  # a Monarch of rank 2
    (18, [(4, 6, 5, 1), (1, 2, 3, 8)]),  # ranks 0 and 1
    (37, [(3, 10, 7, 1), (1, 4, 6, 5)]),
    (2, [(5, 4, 3, 1), (1, 3, 10, 2)]),
    (5, [(2, 0, 4, 1), (1, 3, 0, 2)]),
    (3, [(1, 4, 9, 1), (1, 7, 4, 1)]),  # low rank
    (5, [(4, 3, 2, 1), (1, 2, 6, 2)]),  # J does not divide Q < S
    (3, [(6, 2, 5, 1), (1, 3, 3, 4)]),
    (4, [(2, 3, 2, 2), (2, 2, 3, 2)]),  # no Monarch
    (3, [(4, 2, 2, 1), (2, 2, 2, 2), (1, 2, 2, 4)]),
    (2, [(5, 4, 3, 1), (1, 2, 5, 4), (2, 3, 4, 1)]),
]
# On the CPU alone: several tiles of tokens and of each size.
LARGE = [
    (1, [(64, 64, 48, 1)]),
    (70, [(2, 300, 500, 1)]),
    (1100, [(3, 20, 33, 7)]),
    (70, [(2, 20, 37, 40)]),
    (70, [(16, 30, 70, 1), (1, 50, 24, 20)]),
]


def arguments(size, dtype, device, bias=True, requires_grad=False, layout="slice"):
    """x, bias and the factors."""
    tokens, shapes = size
    (a, _, c, d), (e, f, _, g) = shapes[0], shapes[-1]
    made = [
        make(tokens, a * c * d, dtype=dtype, device=device, layout=layout),
        make(e * f * g, dtype=dtype, device=device, layout=layout) if bias else None,
    ]
    for shape in shapes:
        scale = max(shape[2], 1) ** -0.5
        made.append(make(*shape, dtype=dtype, device=device, layout=layout, scale=scale))
    return [a if a is None else a.requires_grad_(requires_grad) for a in made]


def ours(x, bias, *factors):
    return sm.ops.kronecker_sparse_linear(x, factors, bias)


def exactly(x, bias, *factors):
    return reference.kronecker_sparse_linear(x, factors, bias)


def _scale(want: torch.Tensor) -> float:
    return max(1.0, want.square().mean().sqrt().item()) if want.numel() else 1.0


def check(args, dtype: torch.dtype, terms: int, layout: str = "slice") -> None:
    """The result with and without gradients recorded, and all gradients."""
    y = ours(*args)
    dy = make(*y.shape, dtype=dtype, device=y.device.type, layout=layout)
    want_y, want = gradients(exactly, args, dy)
    got = torch.autograd.grad(y, [a for a in args if a is not None], dy)
    with torch.no_grad():
        inferred = ours(*args)
    found = (y, inferred, *got)
    wanted = (want_y, want_y, *(g for g in want if g is not None))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, dtype, terms=terms, scale=_scale(b))


def terms(size) -> int:
    return size[0] + sum(b + c for _, b, c, _ in size[1])


@pytest.mark.parametrize("size", SINGLE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_single_factors(backend: Backend, dtype: torch.dtype, size, bias: bool) -> None:
    check(arguments(size, dtype, backend.device, bias, True), dtype, terms(size))


@pytest.mark.parametrize("size", CHAINS, ids=str)
def test_chains(backend: Backend, dtype: torch.dtype, size) -> None:
    # Each product rounds what it gives: a chain's error is that of a sum of such results.
    rounded = len(size[1]) > 2 and dtype in (torch.bfloat16, torch.float16)
    args = arguments(size, dtype, backend.device, requires_grad=True)
    if not rounded:
        check(args, dtype, terms(size))
        return
    dy = make(size[0], size[1][-1][0] * size[1][-1][1] * size[1][-1][3], dtype=dtype)
    want, grads = gradients(exactly, args, dy)
    y = ours(*args)
    got = torch.autograd.grad(y, args, dy.to(y.device))
    for a, b in zip((y, *got), (want, *grads), strict=True):
        error = (reference.exact(a) - b).norm() / b.norm()
        assert error <= 2 * len(size[1]) * reference.UNIT[dtype]


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_several_tiles(size, number: torch.dtype) -> None:
    check(arguments(size, number, "cpu", requires_grad=True), number, terms(size))


@pytest.mark.parametrize("tokens", [6, 7, 16, 31, 33, 49, 64, 97])
@pytest.mark.parametrize("factor", [(5, 18, 21, 1), (2, 9, 7, 19)], ids=str)
def test_tokens_that_make_no_whole_pairs(tokens: int, factor) -> None:
    size = (tokens, [factor])
    check(arguments(size, torch.bfloat16, "cpu", requires_grad=True), torch.bfloat16, terms(size))


@pytest.mark.parametrize("size", [(19, (3, 5, 4)), (2, (4, 3, 7))], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_block_diagonal(
    backend: Backend, dtype: torch.dtype, size: tuple[int, tuple[int, ...]], activation: str
) -> None:
    tokens, (blocks, q, p) = size
    x = make(tokens, blocks * p, dtype=dtype, device=backend.device, requires_grad=True)
    W = make(blocks, q, p, dtype=dtype, device=backend.device, requires_grad=True)
    bias = make(blocks * q, dtype=dtype, device=backend.device, requires_grad=True)

    def exactly(x, W, bias):
        return reference.activated(x @ torch.block_diag(*W).T, bias, activation)

    y = sm.ops.block_diagonal_linear(x, W, bias, activation=activation)
    dy = make(*y.shape, dtype=dtype, device=backend.device)
    want, grads = gradients(exactly, (x, W, bias), dy)
    with torch.no_grad():
        inferred = sm.ops.block_diagonal_linear(x, W, bias, activation=activation)
    assert_close(inferred, want, dtype, terms=p, scale=_scale(want))
    # In training z is rounded before the function.
    assert_close(y, want, dtype, terms=p, scale=2 * _scale(want))
    if activation == "none" or dtype in (torch.float32, torch.float64):
        for a, b in zip(torch.autograd.grad(y, (x, W, bias), dy), grads, strict=True):
            assert_close(a, b, dtype, terms=tokens + q, scale=_scale(b))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=4))[1:], ids=str)
@pytest.mark.parametrize("shapes", [[(2, 3, 2, 2), (3, 2, 4, 1)], [(4, 6, 5, 1), (1, 2, 3, 8)]])
def test_only_the_gradients_asked_for(backend: Backend, wanted: tuple[bool, ...], shapes) -> None:
    args = arguments((9, shapes), torch.float64, backend.device)
    for a, need in zip(args, wanted, strict=True):
        a.requires_grad_(need)
    y = ours(*args)
    dy = make(*y.shape, dtype=torch.float64, device=backend.device)
    y.backward(dy)
    _, want = gradients(exactly, args, dy)
    for a, b, need in zip(args, want, wanted, strict=True):
        assert (a.grad is not None) == need
        if need:
            assert_close(a.grad, b, torch.float64, terms=40)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", [[(2, 7, 9, 3)], [(4, 6, 5, 1), (1, 7, 8, 3)]], ids=str)
def test_layouts(backend: Backend, layout: str, shapes) -> None:
    for tokens in (2, 21):
        args = arguments((tokens, shapes), torch.float32, backend.device, True, True, layout)
        check(args, torch.float32, 60, layout)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 3, 1, 2), (2, 3, 0, 1)], ids=str)
def test_factors_in_any_order_of_dimensions(backend: Backend, order: tuple[int, ...]) -> None:
    back = [order.index(d) for d in range(4)]
    x, bias, *factors = arguments((19, [(2, 7, 9, 3), (6, 5, 7, 1)]), torch.float32, backend.device)
    views = [W.permute(order).contiguous().permute(back).requires_grad_() for W in factors]
    check([x.requires_grad_(), bias.requires_grad_(), *views], torch.float32, 60)


def test_leading_dimensions(backend: Backend) -> None:
    _, bias, *factors = arguments((1, [(5, 4, 2, 1), (1, 3, 10, 2)]), torch.float32, backend.device)
    batch = make(4, 5, 10, device=backend.device, layout="contiguous")
    for chain in (factors, factors[:1]):
        b = bias if len(chain) == 2 else None
        for x in (batch[0, 0], batch[0], batch, batch.transpose(0, 1), batch[:, ::2],
                  batch[:, :, None, :].expand(4, 5, 2, 10), batch[:0]):  # fmt: skip
            got = sm.ops.kronecker_sparse_linear(x, chain, b)
            want = reference.kronecker_sparse_linear(x, chain, b)
            assert got.shape == want.shape
            assert_close(got, want, terms=20, scale=4.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [3, 40])
def test_non_finite_values_propagate(backend: Backend, value: float, tokens: int) -> None:
    """As in the product with the blocks; others stay what they are."""
    for which in range(3):
        args = arguments((tokens, [(2, 3, 4, 3)]), torch.float32, backend.device)
        args[which][(-1,) * args[which].dim()].fill_(value)
        got = ours(*args)
        x, bias, W = map(reference.exact, args)
        want = torch.einsum("tacd,abcd->tabd", x.reshape(-1, 2, 4, 3), W).flatten(1) + bias
        assert torch.equal(got.cpu().isnan(), want.isnan())
        assert torch.equal(got.cpu().isinf(), want.isinf())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_error_of_half_precision(backend: Backend, half: torch.dtype) -> None:
    """At most 1.1 times the error of the same product in plain torch."""
    for tokens in (4, 60):
        size = (tokens, [(3, 20, 24, 5)])
        args = arguments(size, half, backend.device, False, True, "contiguous")
        x, _, W = args
        y = ours(*args)
        plain = torch.einsum("tacd,abcd->tabd", x.reshape(-1, 3, 24, 5), W).flatten(1)
        dy = make(*y.shape, dtype=half, device=backend.device, layout="contiguous")
        want, grads = gradients(exactly, args, dy)
        found = [y, *torch.autograd.grad(y, (x, W), dy)]
        composed = [plain, *torch.autograd.grad(plain, (x, W), dy)]
        for a, b, exact in zip(found, composed, [want, grads[0], grads[2]], strict=True):
            error = (reference.exact(a) - exact).norm()
            assert error <= 1.1 * (reference.exact(b) - exact).norm() + 1e-12


def test_gradcheck(backend: Backend) -> None:
    for shapes in (
        [(1, 2, 3, 2)],
        [(2, 2, 2, 1), (1, 2, 4, 1)],
        [(2, 2, 1, 1), (1, 1, 1, 4), (2, 1, 2, 1)],
        [(2, 2, 0, 1)],
    ):
        args = arguments((3, shapes), torch.float64, backend.device, requires_grad=True)
        assert torch.autograd.gradcheck(ours, args)
        assert torch.autograd.gradgradcheck(ours, args)


def composed(x, bias, *factors):
    for W in factors:
        a, _, c, d = W.shape
        x = torch.einsum("...acd,abcd->...abd", x.unflatten(-1, (a, c, d)), W).flatten(-3)
    return x + bias


@pytest.mark.parametrize("shapes", [[(2, 3, 2, 2)], [(2, 2, 3, 1), (1, 2, 2, 2)]], ids=str)
def test_transforms_and_forward_mode(shapes) -> None:
    given = arguments((4, shapes), torch.float64, "cpu")
    x, bias, W, *rest = given
    tangents = tuple(torch.randn_like(a) for a in given)

    def derivatives(f):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
            tangent = torch.autograd.forward_ad.unpack_dual(f(dual, bias, W, *rest)).tangent
        return [
            *torch.func.jvp(f, tuple(given), tangents),
            torch.func.hessian(lambda W: f(x, bias, W, *rest).square().sum())(W),
            torch.func.vmap(lambda x: f(x, bias, W, *rest))(x.reshape(2, 2, -1)),
            tangent,
        ]

    for a, e in zip(derivatives(ours), derivatives(composed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = arguments((1, [(2, 3, 4, 1), (1, 2, 3, 2)]), torch.float32, "cpu", False)
        self.factors = torch.nn.ParameterList([W.contiguous() for W in made[2:]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sm.ops.kronecker_sparse_linear(x, list(self.factors))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_graphs_that_outlive_the_process_have_gradients() -> None:
    layer, x = Layer(), torch.randn(4, 8)
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for graph in (torch.export.export(layer, (x,)).module(), torch.jit.trace(layer, (x,))):
        parameters = dict(graph.named_parameters())
        chosen = [parameters[name] for name, _ in layer.named_parameters()]
        got = torch.autograd.grad(graph(x).square().sum(), chosen)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], indirect=True)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.structmat
    x, bias, W = arguments((5, [(2, 3, 4, 2)]), dtype, "cpu", layout="contiguous")
    torch.library.opcheck(ops.kronecker_sparse_linear.default, (x[:0], W, None))
    torch.library.opcheck(ops.kronecker_sparse_linear.default, (x, W, bias, 3))
    dy = make(5, 12, dtype=dtype)
    for x_, need in ((x, True), (None, False)):
        torch.library.opcheck(
            ops.kronecker_sparse_linear_backward.default, (dy, x_, W, True, need, not need)
        )


def test_compile(backend: Backend) -> None:
    size = (5, [(5, 4, 3, 1), (1, 2, 5, 4), (2, 3, 4, 1)])
    args = arguments(size, torch.float32, backend.device, requires_grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    dy = make(5, 6, device=backend.device)
    want = torch.autograd.grad(ours(*args), args, dy)
    for a, b in zip(torch.autograd.grad(compiled(*args), args, dy), want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), ours(*args))


def test_autocast(backend: Backend) -> None:
    args = arguments((5, [(2, 3, 4, 1)]), torch.float32, backend.device, requires_grad=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        y = ours(args[0].bfloat16(), *args[1:])
        blocks = sm.ops.block_diagonal_linear(args[0], args[2].squeeze(3), args[1])
    want = ours(*[a.bfloat16() for a in args])
    assert torch.equal(y, want)
    assert torch.equal(blocks, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), args))


def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    for size in [(1, [(16, 64, 64, 1)]), (9, [(1, 150, 200, 3)]), (700, [(8, 16, 24, 2)])]:
        args = arguments(size, dtype, "cpu", requires_grad=True)
        results = []
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            y = ours(*args)
            results.append([y, *torch.autograd.grad(y, args, y.detach())])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


W, NEXT = torch.ones(2, 3, 4, 1), torch.ones(1, 5, 2, 3)
BAD = [
    (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    (TypeError, "x must be dense, got layout torch.sparse_coo", {"x": torch.eye(8).to_sparse()}),
    (TypeError, "factors must be a list of tensors, got Tensor", {"factors": W}),
    (TypeError, r"factors\[1\] must be a tensor, got int", {"factors": [W, 2]}),
    (TypeError, "x is torch.complex64, wanted one of", {"x": torch.ones(3, 8) + 0j}),
    (TypeError, r"factors\[0\] is torch.float64, wanted torch.float32", {"factors": [W.double()]}),
    (ValueError, r"factors\[1\] is on meta, x on cpu", {"factors": [W, NEXT.to("meta")]}),
    (ValueError, "factors is empty, wanted at least one", {"factors": []}),
    (ValueError, "x must have at least 1 dimension, got 0", {"x": torch.tensor(1.0)}),
    (ValueError, r"factors\[0\] must have 4 dimensions, got 3", {"factors": [W[0]]}),
    (
        ValueError,
        r"x has 7 columns, factors\[0\] \(2, 3, 4, 1\) takes a c d = 8",
        {"x": torch.ones(3, 7)},
    ),
    (
        ValueError,
        r"factors\[0\] \(2, 3, 4, 1\) gives 6 columns, factors\[1\] \(1, 5, 2, 2\) takes a c d = 4",
        {"factors": [W, torch.ones(1, 5, 2, 2)]},
    ),
    (ValueError, r"bias has shape \(5,\), wanted \(15,\)", {"bias": torch.ones(5)}),
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(error, message: str, change: dict, grad: bool) -> None:
    good = {"x": torch.ones(3, 8, requires_grad=grad), "factors": [W, NEXT]}
    with pytest.raises(error, match=message):
        sm.ops.kronecker_sparse_linear(**{**good, "bias": None, **change})


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "W must be a tensor, got float", {"W": 1.0}),
        (TypeError, "W must be dense", {"W": torch.ones(2, 3, 4).to_sparse()}),
        (ValueError, "activation is {}, wanted one of none", {"activation": {}}),
        (ValueError, "W must have 3 dimensions, got 4", {"W": W}),
        (ValueError, r"x has 7 columns, W \(2, 3, 4\) takes 8", {"x": torch.ones(3, 7)}),
        (ValueError, r"bias has shape \(2,\), wanted \(6,\)", {"bias": torch.ones(2)}),
        (ValueError, "activation is 'tanh', wanted one of", {"activation": "tanh"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_of_block_diagonal(error, message: str, change: dict, grad: bool) -> None:
    good = {"x": torch.ones(3, 8, requires_grad=grad), "W": torch.ones(2, 3, 4)}
    with pytest.raises(error, match=message):
        sm.ops.block_diagonal_linear(**{**good, "bias": None, **change})


def test_operators_refuse_by_themselves() -> None:
    ops = torch.ops.structmat
    x, dy = torch.ones(3, 8), torch.ones(3, 6)
    with pytest.raises(RuntimeError, match=r"sparse_linear: x is \(3, 7\), wanted \(3, 8\)"):
        ops.kronecker_sparse_linear(torch.ones(3, 7), W)
    with pytest.raises(RuntimeError, match="W must have 4 dimensions, got 3"):
        ops.kronecker_sparse_linear(x, W[0])
    with pytest.raises(RuntimeError, match="the gradient of W needs x, got None"):
        ops.kronecker_sparse_linear_backward(dy, None, W, True, True, False)
    with pytest.raises(RuntimeError, match=r"dy is \(3, 5\), wanted \(3, 6\)"):
        ops.kronecker_sparse_linear_backward(dy[:, :5], x, W, True, True, False)
