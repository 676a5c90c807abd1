# SPDX-License-Identifier: Apache-2.0
"""The demonstration itself: compress, compare with the original, time."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compress.compress import compress_each
from structmat.demo import encoder, measure
from structmat.demo.data import docstring_pairs
from structmat.demo.methods import METHODS

_LAYER_FIGURES = (
    "name",
    "kind",
    "m",
    "n",
    "rank",
    "params_before",
    "params_after",
    "predicted_error",
    "measured_error",
    "sensitivity",
    "seconds",
)
_TEMPERATURE = 0.05  # of the contrastive loss, as the encoder was trained with (scale 20)
_PAIRS_A_BATCH = 16


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    keeps: tuple[float, ...] = (0.8, 0.6, 0.5, 0.4)
    methods: tuple[str, ...] = tuple(METHODS)
    pairs: int = 3000  # read; the first are evaluated, the next calibrate
    evaluation_pairs: int = 500
    calibration_pairs: int = 200
    max_tokens: int = encoder.MAX_TOKENS  # of a text
    rounds: int = 7
    seed: int = 0

    def sizes(self, method: str) -> list[float]:
        """Kept shares a method is shown at, the largest first: its file may serve the smaller."""
        if METHODS[method].once:
            return [min(self.keeps, key=lambda keep: abs(keep - 0.5))]
        return sorted(self.keeps, reverse=True)


FAST = Plan(
    keeps=(0.6, 0.4),
    methods=("svd", "global"),
    pairs=180,
    evaluation_pairs=100,
    calibration_pairs=48,
    rounds=5,
)


@dataclass
class Original:
    """The model as it came."""

    parameters: int
    file_bytes: int
    peak_bytes: int
    recall_at_1: float
    recall_at_10: float
    latency_ms: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """One method at one size, against the original on the same text and in the same rounds."""

    method: str
    label: str
    keep: float
    kept: float
    parameters: int
    file_bytes: int
    peak_bytes: int
    cosine_mean: float
    cosine_p05: float
    recall_at_1: float
    recall_at_10: float
    latency_ms: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    # None: taken from the larger file of the same method. Of global ranks the largest size has the
    # time of the factors, which the others share.
    compress_seconds: float | None = None
    layers: list[dict[str, Any]] | None = None  # likewise


@dataclass
class Demo:
    """Everything the report shows; ``to_dict()`` is report.json."""

    structmat: str
    torch: str
    threads: int
    plan: Plan
    calibration_tokens: int
    original: Original
    results: list[Result]
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def result(self, method: str, keep: float) -> Result:
        return next(r for r in self.results if (r.method, r.keep) == (method, keep))


def contrastive_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """In-batch loss that needs no labels: each query's own document against the others'.

    The first half of the batch are queries ``q``, the second half their documents ``d``:
    ``mean_i -log softmax_j(q_i . d_j / 0.05)_i``.
    """
    embeddings = encoder.embeddings_of(output, batch)
    queries, documents = embeddings.chunk(2)
    scores = queries @ documents.T / _TEMPERATURE
    return nn.functional.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def run(plan: Plan, on_step: Callable[[str, int, int], None] = lambda *_: None) -> Demo:
    """Runs the plan.

    Args:
        on_step: called with what begins, the number of steps done, and their total.
    """
    started = time.perf_counter()
    threads = measure.use_available_cpus()
    steps = _Steps(plan, on_step)
    with tempfile.TemporaryDirectory(prefix="structmat-demo-") as scratch:
        with steps("reading docstrings"):
            pairs = docstring_pairs(plan.seed, plan.pairs)
        bench = _Bench(plan, pairs, Path(scratch))
        with steps("evaluating the original"):
            original = bench.original()
        results = []
        for method in plan.methods:
            for keep in plan.sizes(method):
                with steps(f"{METHODS[method].label}, keep {keep:g}"):
                    results.append(bench.result(method, keep))
        bench.time_all(original, results, steps)
    return Demo(
        structmat=sm.__version__,
        torch=torch.__version__,
        threads=threads,
        plan=plan,
        calibration_tokens=bench.calibration_tokens,
        original=original,
        results=results,
        seconds=time.perf_counter() - started,
    )


class _Steps:
    """Counts steps: one for reading, one for the original, one a result, one a shape timed."""

    def __init__(self, plan: Plan, on_step: Callable[[str, int, int], None]) -> None:
        results = sum(len(plan.sizes(method)) for method in plan.methods)
        self._total = 2 + results + len(measure.SHAPES)
        self._done = 0
        self._on_step = on_step

    def __call__(self, name: str) -> "_Steps":
        self._on_step(name, self._done, self._total)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self._done += 1


class _Bench:
    def __init__(self, plan: Plan, pairs: list[tuple[str, str]], scratch: Path) -> None:
        wanted = plan.evaluation_pairs + plan.calibration_pairs
        if len(pairs) < wanted:
            raise ValueError(
                f"demo: the installed packages hold {len(pairs)} documented names, {wanted} needed"
            )
        held_out = pairs[: plan.evaluation_pairs]
        calibration = pairs[plan.evaluation_pairs : wanted]
        self._plan = plan
        self._scratch = scratch
        self._model, self._tokenizer = encoder.load_encoder()
        self._texts = [query for query, _ in held_out] + [document for _, document in held_out]
        texts = sorted((text for pair in calibration for text in pair), key=len)
        self._batches = self._tokenize(texts)
        self._paired_batches = [
            self._tokenize([q for q, _ in chunk] + [d for _, d in chunk])[0]
            for chunk in (
                calibration[i : i + _PAIRS_A_BATCH]
                for i in range(0, len(calibration), _PAIRS_A_BATCH)
            )
        ]
        self.calibration_tokens = sum(int(b["attention_mask"].sum()) for b in self._batches)
        self._reference = self._embed(self._model)
        self._largest: dict[str, Path] = {}  # of nested methods: holds the smaller sizes
        self._sizes: dict[str, list[tuple[nn.Module, Any]]] = {}  # of the others
        self._networks: dict[str, nn.Module] = {}  # to be timed; values do not matter
        self._network_of: dict[tuple[str, float], str] = {}
        self._peaks: dict[str, int] = {}  # of each network: values do not matter
        self._dense_parameters = 0

    def original(self) -> Original:
        folder = self._scratch / "original"
        self._model.save_pretrained(folder)  # type: ignore[operator]
        recall = encoder.retrieval(*self._reference.chunk(2))
        return Original(
            parameters=_parameters(self._model),
            file_bytes=_file_bytes(folder),
            peak_bytes=measure.peak_bytes(self._model),
            recall_at_1=recall.recall_at_1,
            recall_at_10=recall.recall_at_10,
        )

    def result(self, method: str, keep: float) -> Result:
        model, report = self._compressed(method, keep)
        folder = self._scratch / f"{method}-{keep:g}"
        sm.save_pretrained(model, folder)
        file_bytes = _file_bytes(folder)
        if self._largest.setdefault(method, folder) != folder or method in self._sizes:
            shutil.rmtree(folder)
        if report is not None:
            self._dense_parameters = sum(layer.params_before for layer in report.layers)
        embeddings = self._embed(model)
        network = self._network_of[method, keep] = _network(model)
        self._networks.setdefault(network, model)
        if network not in self._peaks:
            self._peaks[network] = measure.peak_bytes(model)
        cosine = encoder.cosine(embeddings, self._reference)
        recall = encoder.retrieval(*embeddings.chunk(2))
        parameters = _parameters(model)
        removed = _parameters(self._model) - parameters
        return Result(
            method=method,
            label=METHODS[method].label,
            keep=keep,
            kept=1 - removed / self._dense_parameters,
            parameters=parameters,
            file_bytes=file_bytes,
            peak_bytes=self._peaks[network],
            cosine_mean=cosine.mean().item(),
            cosine_p05=cosine.quantile(0.05).item(),
            recall_at_1=recall.recall_at_1,
            recall_at_10=recall.recall_at_10,
            compress_seconds=report and report.seconds,
            layers=report and [_layer(layer) for layer in report.layers],
        )

    def time_all(self, original: Original, results: list[Result], steps: _Steps) -> None:
        # uniform ranks make the same network whatever the method: timed once
        networks = {_network(self._model): self._model, **self._networks}
        for shape in measure.SHAPES:
            name = measure.shape_name(shape)
            with steps(f"timing {shape[0]} x {shape[1]} tokens"):
                times = measure.latencies(networks, shape, self._plan.rounds)
            dense = times[_network(self._model)]
            original.latency_ms[name] = 1e3 * statistics.median(dense)
            for result in results:
                own = times[self._network_of[result.method, result.keep]]
                result.latency_ms[name] = 1e3 * statistics.median(own)
                result.speedup[name] = measure.speedup(dense, own)

    def _compressed(self, method: str, keep: float) -> tuple[nn.Module, Any]:
        """A model, and the report where it was not taken out of a larger file."""
        if method in self._largest and method not in self._sizes:
            return sm.load_pretrained(self._largest[method], keep=keep).eval(), None
        options = dict(METHODS[method].options)
        options |= {"seed": self._plan.seed, "filter": "encoder.*"}  # embeddings know no pooler
        options["calibration"] = self._batches[:: METHODS[method].every]
        if method == "fisher":
            options |= {"objective": contrastive_loss, "calibration": self._paired_batches}
        if options.pop("ranks", "uniform") == "global":
            options["objective"] = encoder.embeddings_of
            keeps = sorted(self._plan.keeps, reverse=True)
            if method not in self._sizes:
                self._sizes[method] = compress_each(self._model, keeps, **options)
            return self._sizes[method].pop(0)
        model, _ = encoder.load_encoder()
        return model, sm.compress(model, keep, **options)

    def _embed(self, model: nn.Module) -> Tensor:
        return encoder.embed(model, self._tokenizer, self._texts, max_tokens=self._plan.max_tokens)

    def _tokenize(self, texts: list[str]) -> list[dict[str, Tensor]]:
        return encoder.tokenize(self._tokenizer, texts, max_tokens=self._plan.max_tokens)


def _layer(layer: Any) -> dict[str, Any]:
    """The layer's figures; of the spectrum five digits, all that a plot can show."""
    figures = {name: getattr(layer, name) for name in _LAYER_FIGURES}
    return {**figures, "spectrum": [float(f"{value:.5g}") for value in layer.spectrum]}


def _network(model: nn.Module) -> str:
    """The same for models that differ in nothing but the values of their parameters."""
    return " ".join(f"{name}{tuple(p.shape)}" for name, p in model.named_parameters())


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
