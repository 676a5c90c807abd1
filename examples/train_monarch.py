# SPDX-License-Identifier: Apache-2.0
"""Trains small language models from scratch: dense layers against Monarch layers.

python examples/train_monarch.py [--seeds 3] [--out monarch_training.png]
python examples/train_monarch.py --large --device cuda

The text is the source code of Python's standard library, which is on every machine, as bytes; every
eighth file is kept for validation. The models are transformers that differ in the linear layers of
their blocks (attention and MLP; embedding and head are dense in all) and in their width:

    dense                     the yardstick
    Monarch, same width       fewer parameters and FLOPs
    Monarch, equal FLOPs      the widest that costs no more than the dense one
    Monarch, equal parameters the widest that has no more of them than the dense one

All of a seed see the same batches and take their steps in turn, so that what else the machine does
meets all of them. At the end: a table, and a picture of the validation loss by step and time.
"""

import math
import statistics
import sys
import sysconfig
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import rich
import torch
import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import structmat as sm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BYTES = 256  # the vocabulary
HEAD = 32  # features of an attention head
Layer = Callable[[int, int], nn.Module]  # in, out


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


class Block(nn.Module):
    def __init__(self, width: int, layer: Layer) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = layer(width, 3 * width), layer(width, width)
        self.up, self.down = layer(width, 4 * width), layer(4 * width, width)
        for last in (self.out, self.down):  # each branch begins as zero
            nn.init.zeros_(last.W2 if isinstance(last, sm.nn.MonarchLinear) else last.weight)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD))
        q, k, v = qkv.movedim((-3, -2), (0, 2))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, context: int, layer: Layer) -> None:
        super().__init__()
        self.width, self.depth, self.context = width, depth, context
        self.bytes, self.places = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, layer) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1]).flatten(0, 1).float()
        return functional.cross_entropy(logits, batch[:, 1:].flatten())

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops(self) -> int:
        """Of a training step, a token: each product once forward and twice backward."""
        weights = self.head.weight.numel()
        for module in self.blocks.modules():
            weights += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        return 6 * (weights + 2 * self.depth * self.context * self.width)


def dense_layer(n: int, m: int) -> nn.Module:
    linear = nn.Linear(n, m)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(n))
    nn.init.zeros_(linear.bias)
    return linear


def monarch_layer(blocks: int | None) -> Layer:
    return lambda n, m: sm.nn.MonarchLinear(n, m, blocks)


def parameter_groups(model: Transformer, lr: float) -> list[dict[str, Any]]:
    """Learning rates by muP: those of matrices go down with their fan-in. ``lr`` is that of a dense
    layer of 128 inputs; see MonarchLinear.reset_parameters for those of its factors."""
    of_fan_in: dict[int, list[nn.Parameter]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            of_fan_in[module.in_features].append(module.weight)
        elif isinstance(module, sm.nn.MonarchLinear):
            of_fan_in[2 * module.W1.shape[3]].append(module.W1)
            of_fan_in[2 * module.n_blocks * module.rank].append(module.W2)
    matrices = {parameter for group in of_fan_in.values() for parameter in group}
    others = [p for p in model.parameters() if p not in matrices]
    groups = [{"params": group, "lr": lr * 128 / n} for n, group in of_fan_in.items()]
    return [*groups, {"params": others, "lr": lr, "weight_decay": 0.0}]


# ---- training -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    width: int = 128  # of the dense model
    depth: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 300
    evaluations: int = 15
    validation: int = 64  # windows
    lr: float = 4e-3
    text: int = 8_000_000  # bytes


LARGE = Plan(768, 12, 512, 64, 4000, 40, 256, 4e-3, 1 << 40)


@dataclass
class Contender:
    name: str
    make: Callable[[], Transformer]
    losses: list[list[float]] = field(default_factory=list)  # of each seed, at each evaluation
    times: list[float] = field(default_factory=list)  # of steps, seconds


@dataclass
class Run:
    """One model in training."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    half: bool

    @classmethod
    def start(cls, model: Transformer, plan: Plan) -> "Run":
        groups = parameter_groups(model, plan.lr)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        warmup = max(1, plan.steps // 20)

        def factor(step: int) -> float:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / plan.steps)
            return min(1, (step + 1) / warmup) * (0.05 + 0.95 * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return cls(model, optimizer, schedule, model.bytes.weight.is_cuda)

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


def contenders(plan: Plan, blocks: int | None) -> list[Contender]:
    def dense() -> Transformer:
        return Transformer(plan.width, plan.depth, plan.context, dense_layer)

    def monarch(width: int) -> Transformer:
        return Transformer(width, plan.depth, plan.context, monarch_layer(blocks))

    step = max(HEAD, plan.width // 4 // HEAD * HEAD)
    with torch.device("meta"):
        flops, parameters = dense().flops(), dense().parameter_count()
        wide = [monarch(width) for width in range(plan.width, 6 * plan.width, step)]
    by_flops = max(model.width for model in wide if model.flops() <= flops)
    by_size = max(model.width for model in wide if model.parameter_count() <= parameters)
    return [
        Contender("dense", dense),
        Contender("Monarch, same width", lambda: monarch(plan.width)),
        Contender("Monarch, equal FLOPs", lambda: monarch(by_flops)),
        Contender("Monarch, equal parameters", lambda: monarch(by_size)),
    ]


def evaluated(plan: Plan) -> list[int]:
    """The numbers of steps after which the models are evaluated."""
    return [plan.steps * i // plan.evaluations for i in range(1, plan.evaluations + 1)]


def train(plan: Plan, runners: list[Contender], seeds: int, device: str) -> None:
    """Fills in the losses and times of the contenders."""
    train_text, validation_text = library_text(plan.text)
    generator = torch.Generator().manual_seed(0)
    held_out = windows(validation_text, plan.validation, plan.context, generator)
    batches = held_out.to(device).split(plan.batch)
    points = set(evaluated(plan))
    for seed in range(seeds):
        runs = []
        for runner in runners:
            torch.manual_seed(seed)
            runs.append(Run.start(runner.make().to(device), plan))
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


# ---- results ------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def table(runners: list[Contender]) -> Table:
    out = Table(box=None)
    out.add_column("model", no_wrap=True)
    for title in ("width", "parameters", "MFLOPs/token", "validation loss", "ms/step"):
        out.add_column(title, justify="right")
    for runner in runners:
        with torch.device("meta"):
            model = runner.make()
        final = [losses[-1] for losses in runner.losses]
        spread = f" \u00b1 {statistics.stdev(final):.3f}" if len(final) > 1 else ""
        out.add_row(
            runner.name,
            str(model.width),
            f"{model.parameter_count():,}",
            f"{model.flops() / 1e6:.2f}",
            f"{mean(final):.3f}{spread}",
            f"{1e3 * statistics.median(runner.times):.1f}",
        )
    return out


def picture(plan: Plan, runners: list[Contender], path: Path) -> None:
    """Mean validation loss over the seeds, the range of them shaded, against steps and time.

    The unit of time is the dense model's training. The steps of all took turns, yet on a machine
    that others use, steps of many small products are slowed more than others.
    """
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    steps = evaluated(plan)
    for runner in runners:
        losses = list(zip(*runner.losses, strict=True))
        pace = statistics.median(runner.times) / statistics.median(runners[0].times) / plan.steps
        for axis, x in ((by_step, steps), (by_time, [step * pace for step in steps])):
            axis.plot(x, [mean(list(of_seeds)) for of_seeds in losses], label=runner.name)
            axis.fill_between(x, [*map(min, losses)], [*map(max, losses)], alpha=0.2, linewidth=0)
    by_step.set(xlabel="step", ylabel="validation loss, nats a byte")
    by_time.set(xlabel="time, that of the dense model = 1")
    for axis in (by_step, by_time):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    by_step.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path(
        "monarch_training.png"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda; bfloat16 autocast on CUDA.")] = "cpu",
    large: Annotated[bool, typer.Option(help="A 12-layer model of width 768; for a GPU.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Models of each kind.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of training.")] = None,
    width: Annotated[int | None, typer.Option(min=32, help="Width of the dense model.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at 128 inputs.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Monarch blocks; each layer's own.")] = None,
) -> None:
    """Trains dense and Monarch language models and compares them."""
    given = {"steps": steps, "width": width, "lr": lr}
    plan = replace(LARGE if large else Plan(), **{k: v for k, v in given.items() if v is not None})
    plan = replace(plan, evaluations=min(plan.evaluations, -(-plan.steps // 10)))
    runners = contenders(plan, blocks)
    train(plan, runners, seeds, device)
    rich.print(table(runners))
    picture(plan, runners, out)
    rich.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
