# SPDX-License-Identifier: Apache-2.0
"""Compressed models on disk: the same model back, smaller ones, and nothing half-written."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from test_compress import LAYER, batches, bert, gpt2  # noqa: E402

import structmat as sm  # noqa: E402
from structmat.compress.report import attached  # noqa: E402


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batches(1)[0])[0]


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("ranks", ["uniform", "global"])
def test_same_model_back(tmp_path: Path, make: Any, ranks: str) -> None:
    model = make()
    report = sm.compress(model, 0.5, ranks=ranks, calibration=batches())
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out")
    assert type(back) is type(model)
    assert not back.training
    assert torch.equal(outputs(back), outputs(model))
    assert attached(back) == [report]
    if make is gpt2:
        assert back.lm_head.weight is back.transformer.wte.weight
        names = safetensors.load_file(tmp_path / "out" / "structmat.safetensors")
        assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)


def test_description(tmp_path: Path) -> None:
    model = bert().to(torch.bfloat16)
    report = sm.compress(model, 0.5, calibration=batches(), filter="encoder.*")
    sm.save_pretrained(model, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "structmat.json").read_text())
    layer = next(x for x in described["layers"] if x["places"] == [LAYER])
    entry = next(x for x in report.layers if x.name == LAYER)
    assert layer == {
        "places": [LAYER],
        "m": 48,
        "n": 48,
        "rank": entry.rank,
        "n_blocks": None,
        "density": None,
        "family": None,
        "bias": True,
        "base": False,
        "dtype": "bfloat16",
        "predicted_error": entry.predicted_error,
        "calibration_hash": report.calibration_hash,
    }
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 48
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_smaller_keep_equals_direct_compression(tmp_path: Path, method: str) -> None:
    model = bert()
    sm.compress(model, 0.7, method=method, calibration=batches())
    sm.save_pretrained(model, tmp_path / "out")
    small = sm.load_pretrained(tmp_path / "out", keep=0.4)
    direct = bert()
    report = sm.compress(direct, 0.4, method=method, calibration=batches())
    for (name, x), y in zip(small.state_dict().items(), direct.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(outputs(small), outputs(direct), rtol=1e-6, atol=1e-5)
    (loaded,) = attached(small)
    assert loaded.kept == report.kept
    for a, b in zip(loaded.layers, report.layers, strict=True):
        assert a.rank == b.rank
        assert a.predicted_error == pytest.approx(b.predicted_error, rel=1e-9)


def test_smaller_keep_with_global_ranks(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.6, ranks="global", calibration=batches(), filter="encoder.*")
    sm.save_pretrained(model, tmp_path / "out")
    small = sm.load_pretrained(tmp_path / "out", keep=0.4)
    (report,) = attached(small)
    assert 0.35 < report.kept <= 0.4
    for layer in report.layers:
        if layer.rank:
            assert small.get_submodule(layer.name).rank == layer.rank
            assert layer.predicted_error == layer.errors[layer.rank]


def test_dtype_and_device(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(back).float(), outputs(model), rtol=0.1, atol=0.2)


def test_any_module_and_tied_layers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
        model[2].weight = model[0].weight
        model.register_buffer("scale", torch.ones(3))
        return model

    model = build()
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match="give model"):
        sm.load_pretrained(tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", model=build())
    x = torch.randn(3, 24)
    assert torch.equal(back(x), model(x))
    assert back[0].U is back[2].U
    again = sm.load_pretrained(tmp_path / "out", keep=0.3, model=back)
    assert again[0].rank == 3
    with pytest.raises(ValueError, match="no layer 0"):
        sm.load_pretrained(tmp_path / "out", model=nn.ModuleDict({"a": nn.Linear(24, 24)}))


def test_a_layer_made_by_hand(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0] = sm.nn.LowRankLinear.from_linear(model[0], 3)
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", model=nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(2, 8)
    assert torch.equal(back(x), model(x))
    with pytest.raises(ValueError, match="no report"):
        sm.load_pretrained(tmp_path / "out", keep=0.2, model=nn.Sequential(nn.Linear(8, 8)))


class Tokenizer:
    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def save_pretrained(self, folder: Path) -> None:
        if self.fail:
            raise OSError("disk full")
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.5, method="svd")
    with pytest.raises(OSError, match="disk full"):
        sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer(fail=True))
    assert list(tmp_path.iterdir()) == []
    sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer())
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "tokenizer.json" in before
    with pytest.raises(OSError, match="disk full"):
        sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer(fail=True))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    sm.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bad_folders(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.5, method="svd")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        sm.save_pretrained(model, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        sm.save_pretrained(model, tmp_path / "other")
    with pytest.raises(ValueError, match=r"no structmat\.json"):
        sm.load_pretrained(tmp_path / "other")
    sm.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was compressed to keep=0\.5, got 0\.8"):
        sm.load_pretrained(tmp_path / "out", keep=0.8)
    with pytest.raises(ValueError, match="keep must lie between"):
        sm.load_pretrained(tmp_path / "out", keep=0)
    description = json.loads((tmp_path / "out" / "structmat.json").read_text())
    description["format"] = 99
    (tmp_path / "out" / "structmat.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="format 99"):
        sm.load_pretrained(tmp_path / "out")


def tiny(*features: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(n, m, bias) for n, m in itertools.pairwise(features)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", [0, 1])
def test_interrupted_renames_restore_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: int
) -> None:
    model = tiny(8, 8)
    sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer())
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step + 1:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        sm.save_pretrained(model, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parents_links_and_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(8, 8)
    with pytest.raises(OSError, match="disk full"):
        sm.save_pretrained(model, tmp_path / "a" / "b" / "out", tokenizer=Tokenizer(fail=True))
    assert list(tmp_path.iterdir()) == []
    sm.save_pretrained(model, tmp_path / "a" / "b" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "out")
    sm.save_pretrained(model, tmp_path / "link", tokenizer=Tokenizer())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a" / "b" / "out" / "tokenizer.json").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sm.save_pretrained(model, ".")
    assert sm.load_pretrained(tmp_path / "here", model=tiny(8, 8)) is not None


def test_other_files_in_the_folder_are_kept(tmp_path: Path) -> None:
    model = tiny(8, 8)
    sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer())
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="something else than a compressed model, 'notes'"):
        sm.save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "notes" / "mine.txt").read_text() == "precious"
    assert (tmp_path / "out" / "tokenizer.json").exists()


class Idle(nn.Module):
    """Its last layer has no part in the output; one is too thin for any rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(24, 32), nn.Linear(32, 24)
        self.idle, self.thin = nn.Linear(24, 24), nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(torch.relu(self.a(x)))
        self.idle(y)
        return y + self.thin(y)


def test_smaller_global_keep_counts_what_compress_counts(tmp_path: Path) -> None:
    data = [torch.randn(64, 24, generator=torch.Generator().manual_seed(3))]
    model = Idle()
    large = sm.compress(model, 0.7, ranks="global", method="svd", calibration=data)
    assert all(x.rank for x in large.layers if x.name != "thin")
    sm.save_pretrained(model, tmp_path / "out")
    direct = sm.compress(Idle(), 0.4, ranks="global", method="svd", calibration=data)
    (loaded,) = attached(sm.load_pretrained(tmp_path / "out", keep=0.4, model=Idle()))
    assert [(x.name, x.rank) for x in loaded.layers] == [(x.name, x.rank) for x in direct.layers]


def test_smallest_keep_is_named_and_loads(tmp_path: Path) -> None:
    model = tiny(24, 24, 24)
    with torch.no_grad():  # the second layer's outputs count for little where the first is flat
        model[0].weight.copy_(torch.outer(torch.randn(24), torch.randn(24)))
    data = [torch.randn(64, 24, generator=torch.Generator().manual_seed(3))]
    report = sm.compress(model, 0.9, ranks="global", method="svd", calibration=data)
    assert [x.rank is None for x in report.layers] == [False, True]
    sm.save_pretrained(model, tmp_path / "out")
    built = tiny(24, 24, 24)
    with pytest.raises(ValueError, match=r"smallest keep this model can be loaded with") as caught:
        sm.load_pretrained(tmp_path / "out", keep=0.3, model=built)
    assert isinstance(built[0], nn.Linear)
    smallest = float(str(caught.value).split(" is ")[1].split(",")[0])
    back = sm.load_pretrained(tmp_path / "out", keep=smallest, model=built)
    assert back[0].rank == 1
    with pytest.raises(ValueError, match="smallest keep"):
        sm.load_pretrained(tmp_path / "out", keep=smallest - 1e-3, model=tiny(24, 24, 24))


def test_smaller_sequential_model_predicts_nothing(tmp_path: Path) -> None:
    model = tiny(24, 24, 24)
    data = [torch.randn(64, 24, generator=torch.Generator().manual_seed(3))]
    sm.compress(model, 0.6, sequential=True, calibration=data)
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", keep=0.3, model=tiny(24, 24, 24))
    (report,) = attached(back)
    assert [x.predicted_error for x in report.layers] == [None, None]
    assert " - " in str(report)
    sm.save_pretrained(back, tmp_path / "again")
    sm.load_pretrained(tmp_path / "again", keep=0.2, model=tiny(24, 24, 24))


def test_two_compressions_keep_both_reports(tmp_path: Path) -> None:
    model = tiny(24, 24, 24)
    reports = [sm.compress(model, k, method="svd", filter=f) for k, f in [(0.6, "0"), (0.3, "1")]]
    assert attached(model) == reports
    sm.save_pretrained(model, tmp_path / "out")
    assert attached(sm.load_pretrained(tmp_path / "out", model=tiny(24, 24, 24))) == reports
    back = sm.load_pretrained(tmp_path / "out", keep=0.4, model=tiny(24, 24, 24))
    assert [x.keep for x in attached(back)] == [0.4, 0.3]
    assert (back[0].rank, back[1].rank) == (4, 3)


@pytest.mark.parametrize(
    "other",
    [
        tiny(16, 24, 8),
        tiny(24, 16, 24),
        tiny(24, 24, 24, bias=False),
        tiny(24, 24, 24, 24),
        nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(tmp_path: Path, other: nn.Module) -> None:
    model = tiny(24, 24, 24)
    sm.compress(model, 0.5, method="svd", filter="0")
    sm.save_pretrained(model, tmp_path / "out")
    before = dict(other.named_parameters())
    with pytest.raises(ValueError, match="load_pretrained: "):
        sm.load_pretrained(tmp_path / "out", model=other)
    after = dict(other.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_damaged_files(tmp_path: Path) -> None:
    model = tiny(24, 24)
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "out")
    tensors, description = (tmp_path / "out" / f"structmat.{x}" for x in ("safetensors", "json"))
    whole, text = tensors.read_bytes(), description.read_text()
    for end in (4, 60, len(whole) - 8):
        tensors.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"structmat\.safetensors is damaged"):
            sm.load_pretrained(tmp_path / "out", model=tiny(24, 24))
    tensors.write_bytes(whole)
    for key in ("format", "class", "layers", "shared", "reports"):
        stored = json.loads(text)
        del stored[key]
        description.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=rf"structmat\.json has no '{key}'"):
            sm.load_pretrained(tmp_path / "out", model=tiny(24, 24))
    for wrong in (text[:-20], "[]", text.replace('"spectrum"', '"spectra"')):
        description.write_text(wrong)
        with pytest.raises(ValueError, match=r"cannot read .*structmat\.json"):
            sm.load_pretrained(tmp_path / "out", model=tiny(24, 24))


def test_classes_of_transformers(tmp_path: Path) -> None:
    model = gpt2()
    model.generation_config.max_new_tokens = 7
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "out")
    state = torch.random.get_rng_state()
    back = sm.load_pretrained(tmp_path / "out")
    assert back.generation_config.max_new_tokens == 7
    assert torch.equal(torch.random.get_rng_state(), state)
    description = json.loads((tmp_path / "out" / "structmat.json").read_text())
    description["class"] = "AutoModel"
    (tmp_path / "out" / "structmat.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="AutoModel is not a model of transformers"):
        sm.load_pretrained(tmp_path / "out")

    def build() -> nn.Module:
        return transformers.BertModel(bert().config, add_pooling_layer=False)

    model = build().eval()
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "bert")
    with pytest.raises(ValueError, match="give the model that was compressed"):
        sm.load_pretrained(tmp_path / "bert")
    back = sm.load_pretrained(tmp_path / "bert", model=build())
    assert torch.equal(outputs(back), outputs(model))


def test_layers_with_hooks_are_refused() -> None:
    model = tiny(24, 24, 24)
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1 has hooks"):
        sm.compress(model, 0.5, method="svd")
    sm.compress(model, 0.5, method="svd", filter="0")
    handle.remove()
    sm.compress(model, 0.5, method="svd")


def test_shared_biases_and_storages_stay_shared(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = tiny(24, 24, 24)
        model[1].bias = model[0].bias
        model[1].weight = nn.Parameter(model[0].weight.data)  # another parameter, the same memory
        return model

    model = build()
    assert len(sm.compress(model, 0.5, method="svd").layers) == 1
    assert model[0].U is model[1].U
    assert model[0].bias is model[1].bias
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", model=build())
    assert back[0].V is back[1].V
    assert back[0].bias is back[1].bias


def test_compress_draws_no_random_numbers() -> None:
    model = tiny(24, 24)
    state = torch.random.get_rng_state()
    sm.compress(model, 0.5, method="svd")
    sm.nn.LowRankLinear.from_linear(nn.utils.skip_init(nn.Linear, 8, 8).requires_grad_(False), 2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("make", ["T5Model", "MambaModel"])
def test_models_that_read_the_weight(make: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 100, "num_layers": 1, "num_hidden_layers": 1}
    if make == "T5Model":
        sizes |= {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    else:
        sizes |= {"hidden_size": 32, "state_size": 4}
    config = getattr(transformers, make.replace("Model", "Config"))(**sizes)
    model = getattr(transformers, make)(config).eval()
    ids = torch.arange(1, 13).reshape(2, 6)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if make == "T5Model" else {})
    sm.compress(model, 0.5, method="svd")
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, sm.nn.LowRankLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(parent), leaf, layer.to_linear())
    with torch.no_grad():
        wanted, got = dense(**inputs)[0], model(**inputs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
