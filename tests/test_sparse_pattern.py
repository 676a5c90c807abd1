# SPDX-License-Identifier: Apache-2.0
"""Sparse patterns: drawing, conversions, saving, refusing."""

import copy
import pickle

import pytest
import torch

import structmat as sm

FAMILIES = ("uniform", "columns", "vector16", "block16")
SHAPES = [(64, 96), (33, 50), (5, 7), (20, 5000), (0, 4), (4, 0)]
STRIPS = {"uniform": 1, "vector16": 16, "block16": 16}
random = sm.SparsePattern.random


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.1, 1])
def test_random_and_back(family: str, shape: tuple[int, int], density: float) -> None:
    m, n = shape
    pattern = random(m, n, density, family=family, seed=3)
    mask = pattern.to_mask()
    assert mask.sum() == pattern.nnz
    assert pattern.nnz == (0 if density == 0 else m * n if density == 1 else pattern.nnz)
    if family == "uniform":
        assert pattern.nnz == int(density * m * n + 0.5)
    elif m and n:
        strips = [mask] if family == "columns" else mask.split(16)
        for strip in strips:
            assert (strip == strip[0]).all()
            if family == "block16":
                blocks = strip[0].split(16)
                assert all(block.all() or not block.any() for block in blocks)
                assert -1 < sum(map(torch.any, blocks)) - density * len(blocks) < 1
            elif family == "columns":
                assert strip[0].sum() == int(density * n + 0.5)
            else:
                assert -1 < strip[0].sum() - density * n < 1
    assert random(m, n, density, family=family, seed=3) == pattern

    W = torch.randn(m, n)
    values = pattern.gather(W)
    assert torch.equal(values, W[mask])  # the order is row by row
    assert torch.equal(pattern.scatter(values), W * mask)
    other, permutation = pattern.transpose()
    assert other.shape == (n, m)
    assert torch.equal(other.scatter(values[permutation]), pattern.scatter(values).T)
    crow, row, column = pattern.coordinates()
    assert torch.equal(torch.stack([row, column], 1), mask.nonzero())
    assert torch.equal(crow.diff(), mask.sum(1))

    assert sm.SparsePattern.from_mask(mask, family=family) == pattern
    assert sm.SparsePattern.from_scores(mask.float(), density, family=family) == pattern
    free = sm.SparsePattern.from_csr(crow, column, shape)
    assert free == sm.SparsePattern.from_mask(mask)
    for indices in (False, True):
        assert sm.SparsePattern.from_state_dict(pattern.state_dict(indices=indices)) == pattern


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_torch_csr() -> None:
    pattern = random(20, 30, 0.2)
    values = torch.randn(pattern.nnz)
    sparse = pattern.to_csr(values)
    assert torch.equal(sparse.to_dense(), pattern.scatter(values))
    assert sm.SparsePattern.from_csr(sparse) == pattern


def test_a_draw_depends_on_seed_and_places_alone() -> None:
    columns = sm.SparsePattern.random(2, 12, 0.25, family="columns", seed=7).coordinates()[2][:3]
    again = sm.SparsePattern.random(9, 12, 0.25, family="columns", seed=7).coordinates()[2][:3]
    assert torch.equal(columns, again)
    assert random(12, 12, 0.2, seed=1) != random(12, 12, 0.2, seed=2)


@pytest.mark.parametrize("shape", [(64, 64), (33, 64), (1, 64), (15, 16), (160, 32)], ids=str)
@pytest.mark.parametrize("density", [1e-9, 0.01, 0.1, 0.29, 0.5, 0.97])
@pytest.mark.parametrize("family", ["vector16", "block16"])
def test_strips_have_nearest_to_the_density(
    family: str, density: float, shape: tuple[int, int]
) -> None:
    m, n = shape
    pattern = random(m, n, density, family=family, seed=3)
    assert 0 < pattern.nnz <= max(density * m * n + 128, 256)
    if density * m * n >= 256:
        assert abs(pattern.nnz - density * m * n) <= (8 if family == "vector16" else 128)
    rows = pattern.to_mask().sum(1)
    assert rows.max() - rows.min() <= (1 if family == "vector16" else 16)
    assert sm.SparsePattern.from_scores(torch.rand(m, n), density, family=family).nnz == pattern.nnz
    assert random(m, n, density, family=family, device="meta").nnz == pattern.nnz
    assert sm.SparsePattern.from_state_dict(pattern.state_dict()) == pattern


def test_strips_that_take_one_more_are_spread() -> None:
    rows = random(16 * 8 + 1, 10, 0.25, family="vector16").to_mask().sum(1)[::16]
    assert rows.tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 2]


def test_a_transpose_made_in_inference_mode_has_gradients() -> None:
    pattern = random(5, 7, 0.4)
    with torch.inference_mode():
        pattern.transpose()
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, v: sm.ops.sparse_linear(x, pattern, v), (x, values)
    )


def test_a_uniform_draw_is_uniform() -> None:
    counts = sum(random(4, 5, 0.3, seed=s).to_mask().double() for s in range(400))
    assert counts.sum() == 400 * 6
    assert ((counts - 120).abs() < 5 * (400 * 0.3 * 0.7) ** 0.5).all()


def test_largest_scores_win_and_ties_go_to_the_first() -> None:
    scores = torch.rand(65, 80)
    for family in FAMILIES:
        best = sm.SparsePattern.from_scores(scores, 0.2, family=family)
        kept = (scores * best.to_mask()).sum()
        for seed in range(5):
            drawn = random(65, 80, 0.2, family=family, seed=seed)
            assert drawn.nnz == best.nnz or family == "block16"
            assert (scores * drawn.to_mask()).sum() < kept
    top = scores.flatten().topk(1040).values.min()
    uniform = sm.SparsePattern.from_scores(scores, 0.2)
    assert torch.equal(uniform.to_mask(), scores >= top)
    tied = sm.SparsePattern.from_scores(torch.ones(2, 4), 0.5)
    assert tied.to_mask()[0].all()


def test_gather_and_scatter_have_gradients() -> None:
    pattern = random(5, 7, 0.4, family="vector16")
    W = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pattern.gather, W)
    assert torch.autograd.gradgradcheck(pattern.gather, W)
    assert torch.autograd.gradcheck(pattern.scatter, values)
    assert torch.autograd.gradgradcheck(pattern.scatter, values)


def test_equality_copies_and_devices() -> None:
    pattern = random(20, 30, 0.2, family="block16")
    for twin in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert twin == pattern
        assert hash(twin) == hash(pattern)
    assert pattern != random(20, 30, 0.2, family="vector16")
    assert pattern != "pattern"
    assert pattern.to("cpu") is pattern
    meta = random(32, 48, 0.2, family="block16", device="meta")
    assert meta.nnz == random(32, 48, 0.2, family="block16").nnz
    assert meta.device.type == "meta"


def test_index_memory() -> None:
    nnz = {family: random(256, 256, 0.1, family=family).nnz for family in FAMILIES}
    size = {family: random(256, 256, 0.1, family=family).columns.nbytes for family in FAMILIES}
    assert size["uniform"] == 2 * nnz["uniform"]
    assert size["vector16"] == 2 * nnz["vector16"] / 16
    assert size["columns"] == 2 * nnz["columns"] / 256


def test_safetensors(tmp_path) -> None:
    files = pytest.importorskip("safetensors.torch")
    drawn = random(50, 9000, 0.01, seed=5)
    for pattern in (drawn, sm.SparsePattern.from_mask(drawn.to_mask())):
        files.save_file(pattern.state_dict(), tmp_path / "p")
        assert sm.SparsePattern.from_state_dict(files.load_file(tmp_path / "p")) == pattern
    assert random(5, 5, 0.5).state_dict()["drawn"].nbytes == 56


def written(name: str, where, value: int):
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensor = state[name]
        (tensor.view(torch.int16) if name == "columns" else tensor)[where] = value
        return state

    return change


STATES = [
    ("is not the saved one", "drawn", written("drawn", 4, 7)),
    ("7 numbers", "drawn", lambda s: {"drawn": s["drawn"][:6]}),
    ("there is no family 9", "index", written("shape", 2, 9)),
    ("columns missing", "index", lambda s: {k: s[k] for k in ("shape", "starts")}),
    ("starts must ascend", "index", written("starts", 3, 9999)),
    ("starts must ascend", "index", lambda s: s | {"columns": s["columns"][:-1]}),
    ("out of range for 40", "index", written("columns", -1, 50)),
    ("given twice", "index", written("columns", slice(40), 0)),
    ("must ascend", "index", lambda s: s | {"columns": torch.stack(s["columns"].unbind()[::-1])}),
    (r"wanted \(19,\)", "index", written("shape", 0, 18)),
    ("columns torch.int64", "index", lambda s: s | {"columns": s["columns"].long()}),
    ("a block lacks columns", "block", written("columns", 0, 1)),
]


@pytest.mark.parametrize(("message", "name", "change"), STATES, ids=[s[0] for s in STATES])
def test_spoiled_states_are_refused(message: str, name: str, change) -> None:
    family = "block16" if name == "block" else "uniform"
    state = random(17, 40, 0.3, family=family).state_dict(indices=name != "drawn")
    state = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        sm.SparsePattern.from_state_dict(change(state))


def csr(crow: list[int], columns: list[int], shape=(2, 4), dtype=torch.int64):
    return lambda: sm.SparsePattern.from_csr(
        torch.tensor(crow), torch.tensor(columns, dtype=dtype), shape
    )


BAD = [
    (ValueError, "a column is given twice", csr([0, 2, 2], [1, 1])),
    (ValueError, "must ascend", csr([0, 2, 2], [2, 1])),
    (ValueError, "column 4 is out of range for 4", csr([0, 2, 2], [1, 4])),
    (ValueError, "column -1 is out of range", csr([0, 2, 2], [-1, 2])),
    (ValueError, "crow must ascend from 0 to nnz = 2", csr([0, 1, 1], [1, 2])),
    (ValueError, r"crow is \(2,\)", csr([0, 2], [1, 2])),
    (TypeError, "columns is torch.float32", csr([0, 2, 2], [1, 2], dtype=torch.float32)),
    (TypeError, "wanted a CSR tensor, or", lambda: sm.SparsePattern.from_csr(torch.tensor([0]))),
    (ValueError, "density is 1.5", lambda: random(2, 2, 1.5)),
    (ValueError, "density is True", lambda: random(2, 2, True)),
    (TypeError, r"shape is 3, wanted \(m, n\)", csr([0, 2, 2], [1, 2], shape=3)),
    (TypeError, "wanted a dictionary of tensors, got list",
     lambda: sm.SparsePattern.from_state_dict([torch.ones(2)])),
    (ValueError, "density is nan", lambda: random(2, 2, float("nan"))),
    (ValueError, "family is 'rows'", lambda: random(2, 2, 0.5, family="rows")),
    (ValueError, "seed is -1", lambda: random(2, 2, 0.5, seed=-1)),
    (ValueError, "no negative size", lambda: random(-2, 2, 0.5)),
    (TypeError, "m must be an integer", lambda: random(2.0, 2, 0.5)),
    (TypeError, "wanted torch.bool", lambda: sm.SparsePattern.from_mask(torch.ones(2, 2))),
    (ValueError, "is no pattern of family 'columns'",
     lambda: sm.SparsePattern.from_mask(torch.eye(3).bool(), family="columns")),
    (ValueError, "finite and not negative",
     lambda: sm.SparsePattern.from_scores(torch.tensor([[1.0, torch.nan]]), 0.5)),
    (ValueError, "finite and not negative",
     lambda: sm.SparsePattern.from_scores(torch.tensor([[1.0, -1.0]]), 0.5)),
    (ValueError, "a column is given twice",
     lambda: sm.SparsePattern.from_columns(2, 4, torch.tensor([1, 1]))),
    (ValueError, r"gather: W is \(2, 3\), wanted \(2, 2\)",
     lambda: random(2, 2, 0.5).gather(torch.ones(2, 3))),
    (ValueError, r"scatter: values is \(3,\), wanted \(2,\)",
     lambda: random(2, 2, 0.5).scatter(torch.ones(3))),
    (TypeError, "use SparsePattern.random", sm.SparsePattern),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(error, message: str, call) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("wanted", [1, 40, 20_000, 300_000, 699_999])
@pytest.mark.parametrize("kind", ["drawn", "equal", "ascending"])
def test_the_best_of_many_scores(wanted: int, kind: str) -> None:
    """Chosen by a sample, which ascending scores and equal ones do their best to mislead."""
    m, n = 700, 1000
    scores = {
        "drawn": torch.rand(m, n),
        "equal": torch.randint(4, (m, n)).float(),
        "ascending": torch.arange(m * n).view(m, n).float(),
    }[kind]
    order = scores.flatten().sort(descending=True, stable=True).indices[:wanted]
    mask = torch.zeros(m * n, dtype=torch.bool)
    mask[order] = True
    found = sm.SparsePattern.from_scores(scores, wanted / (m * n))
    assert torch.equal(found.to_mask().flatten(), mask)
