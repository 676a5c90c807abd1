# SPDX-License-Identifier: Apache-2.0
"""monarch_linear: forward and gradients against float64, on every back end."""

import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
from conftest import Backend
from reference import LAYOUTS, assert_close, gradients, make

import structmat as sm

# (tokens, K, J, R, I, L): ones, odd sizes, more tokens than a tile; none of each but K and J.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (1, 3, 5, 2, 9, 4),
    (3, 2, 3, 2, 5, 7),
    (17, 4, 4, 1, 4, 4),
    (20, 16, 2, 3, 3, 19),
    (37, 3, 2, 9, 17, 33),
    (70, 2, 5, 5, 19, 3),
    (0, 2, 3, 2, 5, 4),
    (5, 2, 3, 0, 5, 4),
    (5, 2, 3, 2, 0, 4),
    (5, 2, 3, 2, 5, 0),
]
# On the CPU alone: one token and a few, several tiles of each kind, blocks smaller than a vector.
LARGE = [
    (1, 24, 24, 1, 64, 64),
    (2, 16, 16, 16, 96, 100),
    (13, 16, 8, 20, 70, 130),
    (70, 2, 2, 300, 600, 500),
    (600, 8, 9, 11, 65, 37),
    (1500, 33, 31, 1, 3, 5),
]


def arguments(size, dtype, device, bias=True, requires_grad=False, layout="slice"):
    tokens, K, J, R, I, L = size
    shapes = [(tokens, K * I), (K, J, R, I), (J, L, K, R), (J * L,)]
    scales = [1.0, max(I, 1) ** -0.5, max(K * R, 1) ** -0.5, 1.0]
    made = [
        make(*shape, dtype=dtype, device=device, scale=scale, layout=layout)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    if not bias:
        made[3] = None
    return [a if a is None else a.requires_grad_(requires_grad) for a in made]


def terms(size) -> int:
    tokens, K, J, R, I, L = size
    return tokens + (K + J) * R + I + L


def _scale(want: torch.Tensor) -> float:
    return max(1.0, want.square().mean().sqrt().item()) if want.numel() else 1.0


def compare(size, dtype, device, **options) -> None:
    """The result with and without gradients recorded, and all gradients."""
    args = arguments(size, dtype, device, requires_grad=True)
    y = sm.ops.monarch_linear(*args, **options)
    dy = make(*y.shape, dtype=dtype, device=device)
    got = torch.autograd.grad(y, args, dy)
    want_y, want = gradients(lambda *a: reference.monarch_linear(*a, **options), args, dy)
    with torch.no_grad():
        inferred = sm.ops.monarch_linear(*args, **options)
    found, wanted = (y, inferred, *got), (want_y, want_y, *want)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, dtype, terms=terms(size), scale=_scale(b))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(backend: Backend, dtype: torch.dtype, size) -> None:
    compare(size, dtype, backend.device)


@pytest.mark.parametrize("size", [(3, 2, 3, 2, 5, 7), (37, 3, 2, 9, 17, 33)], ids=str)
def test_interleaved_output(backend: Backend, dtype: torch.dtype, size) -> None:
    compare(size, dtype, backend.device, output="interleaved")


@pytest.mark.parametrize("size", [(3, 3, 4, 2, 5, 1), (3, 1, 4, 1, 5, 7), (9, 3, 4, 2, 5, 1)])
@pytest.mark.parametrize("output", ["blocked", "interleaved"])
def test_gradient_of_x_alone(
    backend: Backend, dtype: torch.dtype, size: tuple[int, ...], output: str
) -> None:
    """With frozen factors whose columns lie together in more than one way."""
    x, *frozen = arguments(size, dtype, backend.device)
    x.requires_grad_()
    y = sm.ops.monarch_linear(x, *frozen, output=output)
    dy = make(*y.shape, dtype=dtype, device=backend.device)
    found = torch.autograd.grad(y, x, dy)[0]
    exact = partial(reference.monarch_linear, output=output)
    want = gradients(exact, [x, *frozen], dy)[1][0]
    assert_close(found, want, dtype, terms=terms(size), scale=_scale(want))


@pytest.mark.parametrize("size", [(2, 3, 4, 2, 5, 6), (37, 3, 2, 9, 17, 33)], ids=str)
@pytest.mark.parametrize("output", ["blocked", "interleaved"])
def test_hidden_units_that_are_kept(
    backend: Backend, dtype: torch.dtype, size, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sm.ops.monarch, "_keeps_hidden", lambda x, W1: True)
    compare(size, dtype, backend.device, output=output)


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_several_tiles(size, number: torch.dtype) -> None:
    compare(size, number, "cpu")


@pytest.mark.parametrize("size", [(70, 2, 2, 30, 60, 50), (600, 8, 9, 11, 65, 37)], ids=str)
def test_several_tiles_in_other_types_and_orders(size) -> None:
    compare(size, torch.float64, "cpu", output="interleaved")
    compare(size, torch.float16, "cpu", output="interleaved")


@pytest.mark.parametrize("tokens", [6, 7, 16, 31, 33, 49, 64, 97])
@pytest.mark.parametrize("output", ["blocked", "interleaved"])
def test_tokens_that_make_no_whole_pairs(tokens: int, output: str) -> None:
    """Sums over tokens that bfloat16 takes two at a time, from different vectors."""
    compare((tokens, 3, 4, 2, 21, 18), torch.bfloat16, "cpu", output=output)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_activations(backend: Backend, dtype: torch.dtype, activation: str, bias: bool) -> None:
    for size in [(2, 3, 4, 2, 5, 6), (20, 2, 3, 4, 9, 17)]:
        args = arguments(size, dtype, backend.device, bias)
        args[0] *= 4
        want = reference.monarch_linear(*args, activation=activation)
        fused = sm.ops.monarch_linear(*args, activation=activation)
        assert_close(fused, want, dtype, terms=60, scale=_scale(want))
        leaves = [a if a is None else a.requires_grad_() for a in args]
        y = sm.ops.monarch_linear(*leaves, activation=activation)
        # Rounded before and after the function, as torch's composition.
        assert_close(y, want, dtype, terms=60, scale=2 * _scale(want))
        given = [a for a in leaves if a is not None]
        dy = make(*y.shape, dtype=dtype, device=backend.device)
        z = sm.ops.monarch_linear(*leaves)
        function = getattr(torch.nn.functional, activation)
        for a, b in zip(
            torch.autograd.grad(y, given, dy),
            torch.autograd.grad(function(z), given, dy),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_an_activation_keeps_nan(backend: Backend, dtype: torch.dtype) -> None:
    args = arguments((3, 2, 3, 2, 5, 4), dtype, backend.device)
    args[3][1] = torch.nan
    args[3][2] = torch.inf
    for activation in ("relu", "gelu", "silu"):
        y = sm.ops.monarch_linear(*args, activation=activation).cpu()
        assert torch.equal(y.isnan(), reference.exact(args[3]).isnan().expand(3, 12))
        assert torch.equal(y.isposinf(), reference.exact(args[3]).isposinf().expand(3, 12))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=4))[1:], ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_only_the_gradients_asked_for(
    backend: Backend, wanted: tuple[bool, ...], keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sm.ops.monarch, "_keeps_hidden", lambda x, W1: keep)
    for tokens, output in ((9, "blocked"), (3, "blocked"), (3, "interleaved")):
        args = arguments((tokens, 2, 3, 2, 5, 4), torch.float64, backend.device)
        for a, need in zip(args, wanted, strict=True):
            a.requires_grad_(need)
        y = sm.ops.monarch_linear(*args, output=output)
        dy = make(*y.shape, dtype=torch.float64, device=backend.device)
        y.backward(dy)
        exact = partial(reference.monarch_linear, output=output)
        for a, b, need in zip(args, gradients(exact, args, dy)[1], wanted, strict=True):
            assert (a.grad is not None) == need
            if need:
                assert_close(a.grad, b, torch.float64, terms=30)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4))
def test_layouts(backend: Backend, layout: str, which: int) -> None:
    for size in [(2, 3, 4, 2, 5, 6), (21, 2, 3, 4, 9, 17)]:
        args = arguments(size, torch.float32, backend.device)
        args[which] = make(*args[which].shape, device=backend.device, layout=layout, scale=0.5)
        args = [a.requires_grad_() for a in args]
        y = sm.ops.monarch_linear(*args)
        dy = make(*y.shape, device=backend.device, layout=layout)
        want_y, want = gradients(reference.monarch_linear, args, dy)
        found = (y, *torch.autograd.grad(y, args, dy))
        for a, b in zip(found, (want_y, *want), strict=True):
            assert_close(a, b, terms=60, scale=_scale(b))


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)], ids=str)
def test_weights_in_any_order_of_dimensions(backend: Backend, order: tuple[int, ...]) -> None:
    x, W1, W2, bias = arguments((19, 3, 4, 2, 9, 8), torch.float32, backend.device)
    back = [order.index(d) for d in range(4)]
    views = [W.permute(order).contiguous().permute(back) for W in (W1, W2)]
    want = reference.monarch_linear(x, W1, W2, bias)
    assert_close(sm.ops.monarch_linear(x, *views, bias), want, terms=30, scale=_scale(want))


@pytest.mark.parametrize("tokens", [1, 20])
def test_expanded_and_zero_strides(backend: Backend, tokens: int) -> None:
    x = make(10, device=backend.device).expand(tokens, 10)
    W1 = make(1, 3, 1, 5, device=backend.device).expand(2, 3, 2, 5).requires_grad_()
    W2 = make(3, 1, 1, 1, device=backend.device).expand(3, 4, 2, 2).requires_grad_()
    bias = make(1, device=backend.device).expand(12)
    got = sm.ops.monarch_linear(x, W1, W2, bias)
    dy = make(1, device=backend.device).expand(tokens, 12)
    want, grads = gradients(reference.monarch_linear, (x, W1, W2, bias), dy)
    assert_close(got, want, terms=20, scale=10.0)
    for a, b in zip(torch.autograd.grad(got, (W1, W2), dy), grads[1:3], strict=True):
        assert_close(a, b, terms=20, scale=10.0 * tokens)


def test_leading_dimensions(backend: Backend) -> None:
    _, W1, W2, bias = arguments((1, 2, 3, 2, 5, 4), torch.float32, backend.device)
    batch = make(4, 5, 10, device=backend.device, layout="contiguous")
    for x in (batch[0, 0], batch[0], batch, batch[None], batch.transpose(0, 1), batch[:, ::2],
              batch[:, :, None, :].expand(4, 5, 2, 10), batch[:0]):  # fmt: skip
        x = x.detach().requires_grad_()
        got = sm.ops.monarch_linear(x, W1, W2, bias)
        assert got.shape == (*x.shape[:-1], 12)
        dy = torch.ones_like(got)
        want, (dx, *_) = gradients(reference.monarch_linear, (x, W1, W2, bias), dy)
        assert_close(got, want, terms=20, scale=4.0)
        assert_close(torch.autograd.grad(got, x, dy)[0], dx, terms=20, scale=4.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_non_finite_values_propagate(
    backend: Backend, value: float, tokens: int, number: torch.dtype
) -> None:
    """As in the two products; other blocks stay what they are."""
    for which in range(4):
        args = arguments((tokens, 2, 3, 2, 5, 4), number, backend.device)
        args[which][(-1,) * args[which].dim()].fill_(value)
        got = sm.ops.monarch_linear(*args)
        x, W1, W2, bias = map(reference.exact, args)
        h = torch.einsum("kjri,tki->tkjr", W1, x.reshape(-1, 2, 5))
        want = torch.einsum("jlkr,tkjr->tjl", W2, h).reshape(-1, 12) + bias
        assert torch.equal(got.cpu().isnan(), want.isnan())
        assert torch.equal(got.cpu().isinf(), want.isinf())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("size", [(4, 4, 3, 8, 20, 24), (60, 3, 2, 8, 20, 24)], ids=str)
def test_error_of_half_precision(backend: Backend, half: torch.dtype, size) -> None:
    """At most 1.1 times the error of the same products in plain torch."""
    args = arguments(size, half, backend.device, layout="contiguous", requires_grad=True)
    ours = sm.ops.monarch_linear(*args)
    x, W1, W2, bias = args
    K, _, _, I = W1.shape
    h = torch.einsum("kjri,tki->tkjr", W1, x.reshape(-1, K, I))
    plain = torch.einsum("jlkr,tkjr->tjl", W2, h).flatten(1) + bias
    dy = make(*ours.shape, dtype=half, device=backend.device, layout="contiguous")
    want, want_grads = gradients(reference.monarch_linear, args, dy)
    found = [ours, *torch.autograd.grad(ours, args, dy)]
    composed = [plain, *torch.autograd.grad(plain, args, dy)]
    for a, b, exact in zip(found, composed, [want, *want_grads], strict=True):
        error = (reference.exact(a) - exact).norm()
        assert error <= 1.1 * (reference.exact(b) - exact).norm() + 1e-12


def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    # Few tokens and many, few blocks and many.
    for size in [
        (1, 16, 16, 2, 32, 32),
        (9, 2, 3, 40, 150, 90),
        (700, 8, 4, 4, 16, 24),
        (333, 64, 64, 1, 8, 8),  # several chunks of gradients
    ]:
        args = arguments(size, dtype, "cpu", requires_grad=True)
        dy = make(size[0], size[2] * size[5], dtype=dtype)
        results = []
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            y = sm.ops.monarch_linear(*args)
            with torch.no_grad():
                assert torch.equal(y, sm.ops.monarch_linear(*args))
            results.append([y, *torch.autograd.grad(y, args, dy)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("level", ["avx512", "avx2", "baseline"])
def test_other_instruction_sets(level: str) -> None:
    other = Path(__file__).with_name("test_kronecker_sparse.py")
    tests = [f"{__file__}::test_{name}" for name in ("forward_and_gradients", "layouts")]
    tests += [f"{file}::test_several_tiles" for file in (__file__, other)]
    tests += [f"{other}::test_single_factors"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not cuda", "-p", "no:cacheprovider",
         *tests],
        env={**os.environ, "STRUCTMAT_SIMD": level},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


BAD = [
    (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
    (TypeError, "x must be dense, got layout torch.sparse_coo", {"x": torch.eye(8).to_sparse()}),
    (TypeError, "W1 must be dense", {"W1": torch.ones(2, 3, 2, 4).to_sparse()}),
    (ValueError, r"activation is \[\], wanted one of none", {"activation": []}),
    (ValueError, r"output is \[\], wanted blocked", {"output": []}),
    (TypeError, r"x is torch.complex64, wanted one of", {"x": torch.ones(3, 8) + 0j}),
    (TypeError, "W1 is torch.float64, wanted torch.float32 as x", {"W1": torch.ones(4).double()}),
    (ValueError, r"W2 is on meta, x on cpu", {"W2": torch.ones(3, 5, 2, 2, device="meta")}),
    (ValueError, "x must have at least 1 dimension, got 0", {"x": torch.tensor(1.0)}),
    (ValueError, "W1 must have 4 dimensions, got 3", {"W1": torch.ones(3, 2, 4)}),
    (ValueError, r"x has 7 columns, W1 \(2, 3, 2, 4\) takes K I = 8", {"x": torch.ones(3, 7)}),
    (
        ValueError,
        r"W1 is \(2, 3, 2, 4\) and W2 is \(3, 5, 2, 1\), wanted \(K, J, R, I\) and \(J, L, K, R\)",
        {"W2": torch.ones(3, 5, 2, 1)},
    ),
    (ValueError, r"W1 is \(2, 3, 2, 4\) and W2 is \(2, 5, 3, 2\)", {"W2": torch.ones(2, 5, 3, 2)}),
    (
        ValueError,
        "wanted at least one block in each",
        {"x": torch.ones(3, 0), "W1": torch.ones(0, 3, 2, 4), "W2": torch.ones(3, 5, 0, 2)},
    ),
    (ValueError, r"bias has shape \(5,\), wanted \(15,\)", {"bias": torch.ones(5)}),
    (ValueError, "activation is 'tanh', wanted one of none, relu, gelu", {"activation": "tanh"}),
    (ValueError, "output is 'both', wanted blocked or interleaved", {"output": "both"}),
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(error, message: str, change: dict, grad: bool) -> None:
    good = {
        "x": torch.ones(3, 8),
        "W1": torch.ones(2, 3, 2, 4, requires_grad=grad),
        "W2": torch.ones(3, 5, 2, 2, requires_grad=grad),
    }
    with pytest.raises(error, match=message):
        sm.ops.monarch_linear(**{**good, "bias": None, **change})


def test_operators_refuse_by_themselves() -> None:
    ops = torch.ops.structmat
    x, W1, W2 = torch.ones(3, 8), torch.ones(2, 3, 2, 4), torch.ones(3, 5, 2, 2)
    with pytest.raises(RuntimeError, match=r"monarch_linear: x is \(3, 7\), wanted \(3, 8\)"):
        ops.monarch_linear(torch.ones(3, 7), W1, W2)
    with pytest.raises(RuntimeError, match="monarch_linear: W1 is float64, wanted float32"):
        ops.monarch_linear(x, W1.double(), W2)
    with pytest.raises(RuntimeError, match=r"wanted \(K, 1, Q, I\) and \(J, L, 1, S\) with K Q"):
        ops.monarch_linear(x, W1, W2, None, 0, True, False)
    with pytest.raises(RuntimeError, match="monarch_linear: activation is 4, wanted 0"):
        ops.monarch_linear(x, W1, W2, None, 4)
    flags = (False, False, True, True, True, False)
    dy = torch.ones(3, 15)
    with pytest.raises(RuntimeError, match="the gradients of the weights need x, got None"):
        ops.monarch_linear_backward(dy, None, W1, W2, None, *flags)
    with pytest.raises(RuntimeError, match=r"hidden must be \(3, 3, 4\)"):
        ops.monarch_linear_backward(dy, x, W1, W2, torch.ones(3, 3, 5), *flags)
    with pytest.raises(RuntimeError, match=r"dy is \(3, 14\), wanted \(3, 15\)"):
        ops.monarch_linear_backward(torch.ones(3, 14), x, W1, W2, None, *flags)
