# SPDX-License-Identifier: Apache-2.0
"""What the training examples share: text, a model around its blocks, training in turn, results.

The text is the source code of Python's standard library, which is on every machine, as bytes; every
eighth file is kept for validation. The contenders of a seed see the same batches and take their
steps in turn, so that what else the machine does meets all of them.
"""

import math
import statistics
import sys
import sysconfig
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import structmat as sm

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BYTES = 256  # the vocabulary
Layer = Callable[[int, int], nn.Module]  # in, out

Device = Annotated[str, typer.Option(help="cpu, cuda; bfloat16 autocast on CUDA.")]
Large = Annotated[bool, typer.Option(help="12 layers, the dense model of width 768; for a GPU.")]
Seeds = Annotated[int, typer.Option(min=1, help="Models of each kind.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of training.")]
Width = Annotated[int | None, typer.Option(min=32, help="Width of the dense model.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate at 128 inputs.")]


# ---- text ---------------------------------------------------------------------------------


def library_text(limit: int) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources for training and validation, no file in both."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    order = {name: zlib.crc32(name.encode()) for name in files if not skipped & {*name.split("/")}}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for name in sorted(order, key=lambda name: (order[name] >> 3, name)):
        text = files[name].read_bytes()
        parts[order[name] % 8 == 0].append(text)
        total += len(text)
        if total >= limit:
            break
    train, validation = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, validation


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``(count, length + 1)`` bytes from random places."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


# ---- model --------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Bytes to logits of the next byte, around the blocks, the last norm and the head given."""

    def __init__(self, context: int, blocks: list[nn.Module], norm: nn.Module, head: nn.Linear):
        super().__init__()
        self.width, self.context = head.in_features, context
        self.bytes = nn.Embedding(BYTES, self.width)
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), norm, head
        for parameter in head.parameters():
            nn.init.zeros_(parameter)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.bytes(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1]).flatten(0, 1).float()
        return functional.cross_entropy(logits, batch[:, 1:].flatten())

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops(self) -> int:
        """Of a training step, a token: each product once forward and twice backward."""
        weights = sum(weight.numel() for weight, _ in matrices(self))
        return 6 * (weights + 2 * len(self.blocks) * self.context * self.width)


def dense_layer(n: int, m: int, bias: bool = True) -> nn.Module:
    linear = nn.Linear(n, m, bias)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(n))
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, float]]:
    """The matrices of the linear layers, each with what its learning rate goes down with.

    That is its fan-in, as in muP, times the number of matrices whose changes add up in the layer's
    output: two factors, or two and a sparse matrix, whose fan-in is its entries in a row.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight, module.in_features
        elif isinstance(module, sm.nn.MonarchLinear):
            yield module.W1, 2 * module.W1.shape[3]
            yield module.W2, 2 * module.n_blocks * module.rank
        elif isinstance(module, sm.nn.LowRankLinear):
            yield module.V, 2 * module.in_features
            yield module.U, 2 * module.rank
        elif isinstance(module, sm.nn.SparseLowRankLinear):
            yield module.V, 3 * module.in_features
            yield module.U, 3 * module.rank
            yield module.values, 3 * module.values.numel() / module.out_features


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """``lr`` is the learning rate of a dense layer of 128 inputs, and of all but matrices."""
    alike: dict[float, list[nn.Parameter]] = defaultdict(list)
    for weight, inputs in matrices(model):
        alike[inputs].append(weight)
    weights = {weight for group in alike.values() for weight in group}
    others = [p for p in model.parameters() if p not in weights]
    groups = [{"params": group, "lr": lr * 128 / inputs} for inputs, group in alike.items()]
    return [*groups, {"params": others, "lr": lr, "weight_decay": 0.0}]


# ---- training -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    width: int  # of the dense model
    depth: int
    context: int
    batch: int
    steps: int
    evaluations: int
    validation: int  # windows
    lr: float
    text: int = 8_000_000  # bytes

    def changed(self, **given: Any) -> "Plan":
        """With the options of the command line that were given."""
        plan = replace(self, **{k: v for k, v in given.items() if v is not None})
        return replace(plan, evaluations=min(plan.evaluations, -(-plan.steps // 10)))

    def evaluated(self) -> list[int]:
        """The numbers of steps after which the models are evaluated."""
        return [self.steps * i // self.evaluations for i in range(1, self.evaluations + 1)]


LARGE = Plan(768, 12, 512, 64, 4000, 40, 256, 4e-3, 1 << 40)


@dataclass
class Contender:
    name: str
    make: Callable[[], LanguageModel]
    rate: float = 1.0  # times the learning rate of the plan
    losses: list[list[float]] = field(default_factory=list)  # of each seed, at each evaluation
    times: list[float] = field(default_factory=list)  # of steps, seconds
    state: int = 0  # bytes of parameters, gradients, moments and indices
    saved: int = 0  # bytes kept by the forward pass for the backward pass

    @property
    def time(self) -> float:
        return statistics.median(self.times)

    @property
    def final(self) -> list[float]:
        return [losses[-1] for losses in self.losses]


@dataclass
class Run:
    """One model in training."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    half: bool

    @classmethod
    def start(cls, model: LanguageModel, plan: Plan) -> "Run":
        groups = parameter_groups(model, plan.lr)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        warmup = max(1, plan.steps // 20)

        def factor(step: int) -> float:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / plan.steps)
            return min(1, (step + 1) / warmup) * (0.05 + 0.95 * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return cls(model, optimizer, schedule, model.head.weight.is_cuda)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.half):
            return self.model.loss(batch)

    def step(self, batch: Tensor) -> float:
        """Trains on a batch; the seconds it took."""
        begin = time.perf_counter()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        loss.item()  # waits for a GPU
        if self.half:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    @torch.no_grad()
    def validate(self, batches: tuple[Tensor, ...]) -> float:
        """Mean loss, nats a byte."""
        return statistics.fmean(self.loss(batch).item() for batch in batches)

    def memory(self, batch: Tensor) -> tuple[int, int]:
        """The fields ``state`` and ``saved`` of a contender: the bytes of the tensors themselves,
        not of what a step takes for a moment."""
        parameters = [*self.model.parameters()]
        moments = [a for of_one in self.optimizer.state.values() for a in of_one.values()]
        state = [*parameters, *parameters, *moments]  # a gradient is like its parameter
        for module in self.model.modules():
            if isinstance(module, sm.nn.SparseLowRankLinear):
                other, permutation = module.pattern.transpose()
                state += [module.starts, module.columns]
                state += [other.starts, other.columns, permutation]
        held = {a.untyped_storage().data_ptr() for a in parameters}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(a: Tensor) -> Tensor:
            saved[a.untyped_storage().data_ptr()] = a.untyped_storage()
            return a

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
            self.loss(batch)
        return sum(a.nbytes for a in state), sum(
            storage.nbytes() for place, storage in saved.items() if place not in held
        )


def train(plan: Plan, runners: list[Contender], seeds: int, device: str) -> None:
    """Fills in what the contenders measure."""
    train_text, validation_text = library_text(plan.text)
    generator = torch.Generator().manual_seed(0)
    held_out = windows(validation_text, plan.validation, plan.context, generator)
    batches = held_out.to(device).split(plan.batch)
    points = set(plan.evaluated())
    for seed in range(seeds):
        runs = []
        for runner in runners:
            torch.manual_seed(seed)
            own = replace(plan, lr=plan.lr * runner.rate)
            runs.append(Run.start(runner.make().to(device), own))
            runner.losses.append([])
        generator.manual_seed(1000 + seed)
        for step in track(
            range(1, plan.steps + 1), f"seed {seed}", disable=not sys.stderr.isatty()
        ):
            batch = windows(train_text, plan.batch, plan.context, generator).to(device)
            for runner, run in zip(runners, runs, strict=True):
                runner.times.append(run.step(batch))
                if step in points:
                    runner.losses[-1].append(run.validate(batches))
        for runner, run in zip(runners, runs, strict=True):
            runner.state, runner.saved = run.memory(batch)


# ---- results ------------------------------------------------------------------------------


def mean_and_spread(values: list[float], form: str = ".3f") -> str:
    spread = f" \u00b1 {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def table(runners: list[Contender]) -> Table:
    """Losses with the standard deviation over the seeds; times of steps with the ratio to the
    first contender's, which alone means something on a machine that others use."""
    out = Table(box=None)
    out.add_column("model", no_wrap=True)
    titles = "width", "parameters", "MFLOPs/token", "validation loss", "state MiB", "saved MiB"
    for title in (*titles, "ms/step", "ratio"):
        out.add_column(title, justify="right")
    for runner in runners:
        with torch.device("meta"):
            model = runner.make()
        out.add_row(
            runner.name,
            str(model.width),
            f"{model.parameter_count():,}",
            f"{model.flops() / 1e6:.2f}",
            mean_and_spread(runner.final),
            f"{runner.state / 2**20:.1f}",
            f"{runner.saved / 2**20:.1f}",
            f"{1e3 * runner.time:.1f}",
            f"{runner.time / runners[0].time:.2f}",
        )
    return out


def show(what: Any) -> None:
    """Prints, and into a file or a pipe wide enough for every column."""
    Console(width=None if sys.stdout.isatty() else 140).print(what)


def panels(count: int = 2, **given: Any) -> tuple[Any, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(11, 4.2), **given)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return figure, list(axes)


def curve(axis: Axes, x: list[float], runner: Contender, **style: Any) -> None:
    """Mean validation loss over the seeds, the range of them shaded."""
    losses = list(zip(*runner.losses, strict=True))
    (line,) = axis.plot(x, [*map(statistics.fmean, losses)], label=runner.name, **style)
    low, high = [*map(min, losses)], [*map(max, losses)]
    axis.fill_between(x, low, high, alpha=0.2, linewidth=0, color=line.get_color())


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
