# SPDX-License-Identifier: Apache-2.0
"""low_rank_linear: forward and gradients against float64, on every back end."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
from conftest import Backend
from reference import LAYOUTS, LINEAR_SIZES, assert_close, gradients, make

import structmat as sm
from structmat import _C

# Beyond the shared sizes: none of n, m, r; more tokens than a tile; more columns than a chunk.
SIZES = [
    *LINEAR_SIZES,
    (5, 7, 9, 0),
    (5, 7, 0, 3),
    (5, 0, 9, 3),
    (8, 70, 1100, 12),
    (13, 70, 110, 39),
    (300, 100, 70, 40),
]


def arguments(size, dtype, device, bias=True, requires_grad=False, layout="slice"):
    tokens, m, n, r = size
    shapes = [(tokens, n), (m, r), (r, n), (m,)]
    scales = [1.0, max(r, 1) ** -0.5, max(n, 1) ** -0.5, 1.0]
    made = [
        make(*shape, dtype=dtype, device=device, scale=scale, layout=layout)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    if not bias:
        made[3] = None
    return [a if a is None else a.requires_grad_(requires_grad) for a in made]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward(backend: Backend, dtype: torch.dtype, size: tuple[int, ...], bias: bool) -> None:
    args = arguments(size, dtype, backend.device, bias)
    want = reference.low_rank_linear(*args)
    got = sm.ops.low_rank_linear(*args)
    assert_close(got, want, dtype, terms=size[2] + size[3], scale=_scale(want))
    hidden = sm.ops.low_rank_linear(*[a if a is None else a.requires_grad_() for a in args])
    assert_close(hidden.detach(), want, dtype, terms=size[2] + size[3], scale=_scale(want))


def _scale(want: torch.Tensor) -> float:
    return max(1.0, want.square().mean().sqrt().item()) if want.numel() else 1.0


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(backend: Backend, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    args = arguments(size, dtype, backend.device, requires_grad=True)
    y = sm.ops.low_rank_linear(*args)
    dy = make(*y.shape, dtype=dtype, device=backend.device)
    got = torch.autograd.grad(y, args, dy)
    _, want = gradients(reference.low_rank_linear, args, dy)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, dtype, terms=sum(size), scale=_scale(b))


# Several slabs of k and tiles of columns; both ways to the gradient of U.
LARGE = [
    ((2, 1100, 1030, 1024), torch.float32),
    ((1100, 1100, 1030, 1024), torch.float32),
    ((1100, 70, 60, 40), torch.float32),
    ((12, 1100, 1030, 1024), torch.bfloat16),
    ((1100, 1100, 1030, 1060), torch.bfloat16),
    ((1100, 70, 60, 40), torch.bfloat16),
]


@pytest.mark.parametrize(("size", "number"), LARGE, ids=str)
def test_results_of_some_megabytes(size: tuple[int, ...], number: torch.dtype) -> None:
    args = arguments(size, number, "cpu", requires_grad=True)
    y = sm.ops.low_rank_linear(*args)
    dy = make(*y.shape, dtype=number)
    want_y, want = gradients(reference.low_rank_linear, args, dy)
    for a, b in zip((y, *torch.autograd.grad(y, args, dy)), (want_y, *want), strict=True):
        assert_close(a, b, number, terms=2200, scale=_scale(b))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=4))[1:], ids=str)
def test_only_the_gradients_asked_for(backend: Backend, wanted: tuple[bool, ...]) -> None:
    args = arguments((17, 9, 13, 5), torch.float64, backend.device)
    for a, need in zip(args, wanted, strict=True):
        a.requires_grad_(need)
    y = sm.ops.low_rank_linear(*args)
    dy = make(*y.shape, dtype=torch.float64, device=backend.device)
    y.backward(dy)
    _, want = gradients(reference.low_rank_linear, args, dy)
    for a, b, need in zip(args, want, wanted, strict=True):
        assert (a.grad is not None) == need
        if need:
            assert_close(a.grad, b, torch.float64, terms=44)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4))
def test_layouts(backend: Backend, layout: str, which: int) -> None:
    args = arguments((21, 11, 13, 6), torch.float32, backend.device)
    args[which] = make(*args[which].shape, device=backend.device, layout=layout)
    args = [a.requires_grad_() for a in args]
    y = sm.ops.low_rank_linear(*args)
    dy = make(*y.shape, device=backend.device, layout=layout)
    _, want = gradients(reference.low_rank_linear, args, dy)
    for a, b in zip(torch.autograd.grad(y, args, dy), want, strict=True):
        assert_close(a, b, terms=51, scale=_scale(b))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_expanded_and_zero_strides(backend: Backend, tokens: int) -> None:
    x = make(13, device=backend.device).expand(tokens, 13)
    U, V = make(11, 6, device=backend.device), make(1, 13, device=backend.device).expand(6, 13)
    bias = make(1, device=backend.device).expand(11)
    got = sm.ops.low_rank_linear(x, U, V, bias)
    assert_close(got, reference.low_rank_linear(x, U, V, bias), terms=20, scale=10.0)


def test_leading_dimensions(backend: Backend) -> None:
    _, U, V, bias = arguments((1, 6, 10, 3), torch.float32, backend.device)
    batch = make(4, 5, 10, device=backend.device, layout="contiguous")
    for x in (batch[0, 0], batch[0], batch, batch[None], batch.transpose(0, 1), batch[:, ::2],
              batch[:, :, None, :].expand(4, 5, 2, 10), batch[:0], batch[..., 2:8]):  # fmt: skip
        factor = V[:, : x.shape[-1]]
        got = sm.ops.low_rank_linear(x, U, factor, bias)
        assert got.shape == (*x.shape[:-1], 6)
        assert_close(got, reference.low_rank_linear(x, U, factor, bias), terms=13, scale=4.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [3, 12, 40])
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_non_finite_values_propagate(
    backend: Backend, value: float, tokens: int, number: torch.dtype
) -> None:
    for which in range(4):
        args = arguments((tokens, 9, 14, 5), number, backend.device)
        args[which][(-1,) * args[which].dim()].fill_(value)
        got = sm.ops.low_rank_linear(*args)
        h = reference.exact(args[0]) @ reference.exact(args[2]).T
        want = h @ reference.exact(args[1]).T + reference.exact(args[3])
        assert torch.equal(got.cpu().isnan(), want.isnan())
        assert torch.equal(got.cpu().isinf(), want.isinf())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("size", [(4, 96, 160, 24), (200, 96, 160, 24)], ids=str)
def test_error_of_half_precision(backend: Backend, half: torch.dtype, size) -> None:
    """At most 1.1 times the error of the same products in plain torch."""
    args = arguments(size, half, backend.device, layout="contiguous", requires_grad=True)
    ours = sm.ops.low_rank_linear(*args)
    x, U, V, bias = args
    plain = (x @ V.T) @ U.T + bias
    dy = make(*ours.shape, dtype=half, device=backend.device, layout="contiguous")
    want, want_grads = gradients(reference.low_rank_linear, args, dy)
    found = [ours, *torch.autograd.grad(ours, args, dy)]
    composed = [plain, *torch.autograd.grad(plain, args, dy)]
    for a, b, exact in zip(found, composed, [want, *want_grads], strict=True):
        error = (reference.exact(a) - exact).norm()
        assert error <= 1.1 * (reference.exact(b) - exact).norm() + 1e-12


def test_gradcheck(backend: Backend) -> None:
    for size in [(4, 3, 5, 2), (20, 3, 5, 2), (3, 2, 0, 2), (3, 2, 4, 0)]:
        args = arguments(size, torch.float64, backend.device, requires_grad=True)
        assert torch.autograd.gradcheck(sm.ops.low_rank_linear, args)
        assert torch.autograd.gradgradcheck(sm.ops.low_rank_linear, args)


@pytest.mark.parametrize("wanted", [(True, True, False, False), (False, True, True, False)])
def test_second_derivatives_through_the_saved_hidden(backend: Backend, wanted) -> None:
    args = arguments((4, 3, 5, 2), torch.float64, backend.device)
    for a, need in zip(args, wanted, strict=True):
        a.requires_grad_(need)
    assert torch.autograd.gradgradcheck(sm.ops.low_rank_linear, args)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_transforms_and_forward_mode(requires_grad: bool) -> None:
    """Tangents, nested derivatives and batches, against those of two plain products."""
    given = arguments((6, 5, 7, 3), torch.float64, "cpu", requires_grad=requires_grad)
    x, U, V, b = given
    tangents = tuple(torch.randn_like(a) for a in given)

    def derivatives(f):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), tangents[0])
            tangent = torch.autograd.forward_ad.unpack_dual(f(dual, U, V, b)).tangent
        return [
            *torch.func.jvp(f, tuple(given), tangents),
            torch.func.grad(lambda U: f(x, U, V, b).square().sum())(U),
            torch.func.hessian(lambda V: f(x, U, V, b).square().sum())(V),
            torch.func.vmap(f, (0, None, None, None))(x.reshape(2, 3, 7), U, V, b),
            tangent,
        ]

    got = derivatives(sm.ops.low_rank_linear)
    want = derivatives(lambda x, U, V, b: (x @ V.T) @ U.T + b)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_graphs_that_outlive_the_process_have_gradients(tmp_path) -> None:
    layer = sm.nn.LowRankLinear(8, 6, 3)
    x = torch.randn(4, 8)
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    exported = torch.export.export(layer, (x,)).module()
    traced = torch.jit.trace(layer, (x,))
    torch.jit.save(traced, tmp_path / "layer.pt")
    for graph in (exported, traced, torch.jit.load(tmp_path / "layer.pt")):
        parameters = dict(graph.named_parameters())
        chosen = [parameters[name] for name, _ in layer.named_parameters()]
        got = torch.autograd.grad(graph(x).square().sum(), chosen)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_transforms_check_arguments() -> None:
    x, U, V, _ = arguments((6, 5, 7, 3), torch.float64, "cpu")
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        torch.func.vmap(sm.ops.low_rank_linear, (0, None, None))(x.long(), U.long(), V.long())


def test_a_factor_that_no_gradient_needs_may_change() -> None:
    x, U, V, b = arguments((6, 5, 7, 3), torch.float64, "cpu")
    y = sm.ops.low_rank_linear(x, U.requires_grad_(), V, b)
    want = (x @ V.T).sum(0).expand(5, 3).clone()
    V.zero_()
    y.sum().backward()
    torch.testing.assert_close(U.grad, want)


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_after_a_failed_allocation() -> None:
    """Scratch that could not grow does not pass for what it should have become."""
    code = """
import resource, torch, structmat as sm
def step(T, r):
    x, dy = torch.ones(1, 64).expand(T, 64), torch.ones(1, 64).expand(T, 64)
    U, V = torch.ones(64, r), torch.ones(r, 64, requires_grad=True)
    return torch.autograd.grad(sm.ops.low_rank_linear(x, U, V), V, dy)[0][0, 0].item()
torch.set_num_threads(1)
step(1000, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), -1))
for T, r in [(700_000, 1024), (4000, 1024)]:
    try:
        print(step(T, r))
    except (MemoryError, RuntimeError):
        print("refused")
print(step(500, 64))
"""
    assert run_python(code) == ["refused", "256000.0", "32000.0"]


def test_large_scratch_is_given_back() -> None:
    code = """
import resource, torch, structmat as sm
U, V = torch.ones(8, 256), torch.ones(256, 8, requires_grad=True)
x = torch.ones(1, 8).expand(100_000, 8)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
torch.autograd.grad(sm.ops.low_rank_linear(x[:100], U, V), V, x[:100])
before = resident()
torch.autograd.grad(sm.ops.low_rank_linear(x, U, V), V, x)
print((resident() - before) >> 20)
"""
    assert int(run_python(code)[0]) < 50  # dh takes 100 MB


def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.structmat
    plain = arguments((5, 4, 6, 2), dtype, "cpu", layout="contiguous")
    x, U, V, bias = plain
    torch.library.opcheck(ops.low_rank_linear.default, (x[:0], U, V, None))
    torch.library.opcheck(ops.low_rank_linear.default, (x, U, V, bias))
    for keep in (True, False):
        torch.library.opcheck(ops.low_rank_linear_train.default, (*plain, keep))
    dy, h = make(5, 4, dtype=dtype), make(5, 2, dtype=dtype)
    for x_, h_, need in ((x, h, True), (None, None, False)):
        torch.library.opcheck(
            ops.low_rank_linear_backward.default, (dy, x_, U, V, h_, need, not need or True)
        )


def test_compile(backend: Backend) -> None:
    args = arguments((5, 4, 6, 2), torch.float32, backend.device, requires_grad=True)
    compiled = torch.compile(sm.ops.low_rank_linear, fullgraph=True, backend="aot_eager")
    dy = make(5, 4, device=backend.device)
    want = torch.autograd.grad(sm.ops.low_rank_linear(*args), args, dy)
    got = torch.autograd.grad(compiled(*args), args, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), sm.ops.low_rank_linear(*args))


def test_inference_mode(backend: Backend) -> None:
    args = arguments((5, 4, 6, 2), torch.float32, backend.device, requires_grad=True)
    with torch.inference_mode():
        inferred = sm.ops.low_rank_linear(*args)
    assert_close(inferred, reference.low_rank_linear(*args), terms=8, scale=4.0)


def test_autocast(backend: Backend) -> None:
    args = arguments((5, 4, 6, 2), torch.float32, backend.device, requires_grad=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        y = sm.ops.low_rank_linear(args[0].bfloat16(), *args[1:])
    assert y.dtype == torch.bfloat16
    want = sm.ops.low_rank_linear(*[a.bfloat16() for a in args])
    assert torch.equal(y, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), args))


def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    # Few tokens and many, work below and above what one thread does alone.
    for size in [(1, 700, 900, 300), (9, 700, 900, 300), (130, 200, 300, 90), (700, 130, 200, 30)]:
        args = arguments(size, dtype, "cpu", requires_grad=True)
        dy = make(size[0], size[1], dtype=dtype)
        results = []
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            y = sm.ops.low_rank_linear(*args)
            with torch.no_grad():
                plain = sm.ops.low_rank_linear(*args)
            assert torch.equal(y, plain)
            results.append([y, *torch.autograd.grad(y, args, dy)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif("STRUCTMAT_SIMD" in os.environ, reason="a level is asked for")
def test_the_best_instruction_set_is_taken() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if {"amx_bf16", "amx_tile", "avx512_bf16", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        assert _C.simd == "amx"
    elif {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        assert _C.simd == "avx512bf16"
    elif {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        assert _C.simd == "avx512"


@pytest.mark.parametrize("level", ["avx512", "avx2", "baseline"])
def test_other_instruction_sets(level: str) -> None:
    names = ["test_forward", "test_gradients", "test_layouts"]
    if level == "avx512":  # of a machine with AMX
        names.append("test_results_of_some_megabytes")
    tests = [f"{__file__}::{name}" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--backend", "cpu", "-p", "no:cacheprovider",
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
    (TypeError, r"x is torch.int64, wanted one of torch.float32", {"x": torch.ones(3, 6).long()}),
    (TypeError, "U is torch.float64, wanted torch.float32 as x", {"U": torch.ones(4, 2).double()}),
    (ValueError, r"V is on meta, x on cpu", {"V": torch.ones(2, 6, device="meta")}),
    (ValueError, "x must have at least 1 dimension, got 0", {"x": torch.tensor(1.0)}),
    (ValueError, "U must have 2 dimensions, got 1", {"U": torch.ones(4)}),
    (ValueError, r"x has 7 columns, V \(2, 6\) takes 6", {"x": torch.ones(3, 7)}),
    (ValueError, r"U \(4, 3\) has rank 3, V \(2, 6\) 2", {"U": torch.ones(4, 3)}),
    (ValueError, r"bias has shape \(5,\), wanted \(4,\)", {"bias": torch.ones(5)}),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(error, message: str, change: dict, grad: bool) -> None:
    good = {"x": torch.ones(3, 6), "U": torch.ones(4, 2), "V": torch.ones(2, 6)}
    if grad:
        good["U"].requires_grad_()
        good["V"].requires_grad_()
    with pytest.raises(error, match=message):
        sm.ops.low_rank_linear(**{**good, "bias": None, **change})


def test_operator_refuses_by_itself() -> None:
    op = torch.ops.structmat.low_rank_linear
    x, U, V = torch.ones(3, 6), torch.ones(4, 2), torch.ones(2, 6)
    with pytest.raises(RuntimeError, match=r"low_rank_linear: V is \(2, 6\), wanted \(2, 7\)"):
        op(torch.ones(3, 7), U, V)
    with pytest.raises(RuntimeError, match="low_rank_linear: U is float64, wanted float32"):
        op(x, U.double(), V)
    with pytest.raises(RuntimeError, match="low_rank_linear: bias has 5 elements, wanted 4"):
        op(x, U, V, torch.ones(5))
