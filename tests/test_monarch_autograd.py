# SPDX-License-Identifier: Apache-2.0
"""monarch_linear under torch's machinery: second derivatives, transforms, graphs, autocast."""

import pytest
import reference
import torch
from conftest import Backend
from reference import assert_close, make
from test_monarch import arguments

import structmat as sm


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_gradcheck(backend: Backend, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm.ops.monarch, "_keeps_hidden", lambda x, W1: keep)
    for size in [(2, 2, 3, 1, 2, 2), (3, 1, 2, 0, 2, 2), (2, 2, 1, 2, 0, 2)]:
        args = arguments(size, torch.float64, backend.device, requires_grad=True)
        for output in ("blocked", "interleaved"):

            def f(*a: torch.Tensor, output: str = output) -> torch.Tensor:
                return sm.ops.monarch_linear(*a, output=output, activation="silu")

            assert torch.autograd.gradcheck(f, args)
            assert torch.autograd.gradgradcheck(f, args)


def composed(x, W1, W2, bias):
    K, _, _, I = W1.shape
    h = torch.einsum("kjri,...ki->...kjr", W1, x.reshape(*x.shape[:-1], K, I))
    y = torch.einsum("jlkr,...kjr->...jl", W2, h)
    return torch.nn.functional.gelu(y.reshape(*x.shape[:-1], -1) + bias)


def activated(x, W1, W2, bias):
    return sm.ops.monarch_linear(x, W1, W2, bias, activation="gelu")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_transforms_and_forward_mode(requires_grad: bool) -> None:
    """Tangents, nested derivatives and batches, against those of two plain products."""
    given = arguments((6, 2, 3, 2, 3, 2), torch.float64, "cpu", requires_grad=requires_grad)
    x, W1, W2, b = given
    tangents = tuple(torch.randn_like(a) for a in given)

    def derivatives(f):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), tangents[0])
            tangent = torch.autograd.forward_ad.unpack_dual(f(dual, W1, W2, b)).tangent
        return [
            *torch.func.jvp(f, tuple(given), tangents),
            torch.func.grad(lambda W1: f(x, W1, W2, b).square().sum())(W1),
            torch.func.hessian(lambda W2: f(x, W1, W2, b).square().sum())(W2),
            torch.func.vmap(f, (0, None, None, None))(x.reshape(2, 3, 6), W1, W2, b),
            torch.func.vmap(f, (None, 0, None, None))(x, torch.stack([W1, -W1]), W2, b),
            tangent,
        ]

    for a, e in zip(derivatives(activated), derivatives(composed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, *weights = arguments((1, 2, 3, 2, 4, 2), torch.float32, "cpu", layout="contiguous")
        self.W1, self.W2, self.bias = map(torch.nn.Parameter, weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activated(x, self.W1, self.W2, self.bias)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_graphs_that_outlive_the_process_have_gradients(tmp_path) -> None:
    layer, x, longer = Layer(), torch.randn(4, 8), torch.randn(7, 8)
    want = torch.autograd.grad(layer(longer).square().sum(), list(layer.parameters()))
    shapes = {"x": {0: torch.export.Dim("tokens")}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
    traced = torch.jit.trace(layer, (x,))
    torch.jit.save(traced, tmp_path / "layer.pt")
    for graph in (exported, traced, torch.jit.load(tmp_path / "layer.pt")):
        parameters = dict(graph.named_parameters())
        chosen = [parameters[name] for name, _ in layer.named_parameters()]
        got = torch.autograd.grad(graph(longer).square().sum(), chosen)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_transforms_check_arguments() -> None:
    x, W1, W2, _ = arguments((6, 2, 3, 2, 3, 2), torch.float64, "cpu")
    with pytest.raises(TypeError, match=r"x is torch\.complex128, wanted one of"):
        torch.func.vmap(sm.ops.monarch_linear, (0, None, None))(x + 0j, W1 + 0j, W2 + 0j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], indirect=True)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.structmat
    plain = arguments((5, 2, 3, 2, 4, 2), dtype, "cpu", layout="contiguous")
    x, W1, W2, bias = plain
    torch.library.opcheck(ops.monarch_linear.default, (x[:0], W1, W2, None))
    torch.library.opcheck(ops.monarch_linear.default, (x[0], W1, W2, bias, 2, False, True))
    for keep in (True, False):
        torch.library.opcheck(ops.monarch_linear_train.default, (*plain, False, False, keep))
    dy, h = make(5, 6, dtype=dtype), make(3, 5, 4, dtype=dtype, layout="contiguous")
    for given in ((x, h, True), (x, None, True), (None, None, False)):
        x_, h_, weights = given
        torch.library.opcheck(
            ops.monarch_linear_backward.default,
            (dy, x_, W1, W2, h_, False, False, True, weights, weights, not weights),
        )


def test_compile(backend: Backend) -> None:
    args = arguments((5, 2, 3, 2, 4, 2), torch.float32, backend.device, requires_grad=True)
    compiled = torch.compile(activated, fullgraph=True, backend="aot_eager")
    dy = make(5, 6, device=backend.device)
    want = torch.autograd.grad(activated(*args), args, dy)
    got = torch.autograd.grad(compiled(*args), args, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), activated(*args))


def test_compile_with_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm.ops.monarch, "_keeps_hidden", lambda x, W1: True)
    compiled = torch.compile(activated, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        args = arguments((tokens, 2, 3, 2, 4, 2), torch.float32, "cpu", requires_grad=True)
        got = torch.autograd.grad(compiled(*args).square().sum(), args)
        want = torch.autograd.grad(activated(*args).square().sum(), args)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_inference_mode(backend: Backend) -> None:
    args = arguments((5, 2, 3, 2, 4, 2), torch.float32, backend.device, requires_grad=True)
    with torch.inference_mode():
        inferred = sm.ops.monarch_linear(*args)
    assert_close(inferred, reference.monarch_linear(*args), terms=8, scale=4.0)


def test_autocast(backend: Backend) -> None:
    args = arguments((5, 2, 3, 2, 4, 2), torch.float32, backend.device, requires_grad=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        y = sm.ops.monarch_linear(args[0].bfloat16(), *args[1:])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, sm.ops.monarch_linear(*[a.bfloat16() for a in args]))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), args))


def saved_numbers(*args: torch.Tensor) -> int:
    """How many numbers are kept for the backward pass."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t
    ):
        sm.ops.monarch_linear(*args)
    return sum(t.numel() for t in seen.values())


def test_what_is_saved() -> None:
    x, W1, W2, bias = arguments((50, 2, 3, 2, 4, 2), torch.float32, "cpu", requires_grad=True)
    weights = W1.numel() + W2.numel()
    assert saved_numbers(x, W1, W2, bias) == x.numel() + weights
    assert saved_numbers(x, W1.detach(), W2.detach(), bias) == weights
    assert saved_numbers(x.detach(), W1.detach(), W2.detach(), bias) == 0
