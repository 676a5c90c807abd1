# SPDX-License-Identifier: Apache-2.0
"""Trains small language models from scratch: dense layers against Monarch layers.

python examples/train_monarch.py [--seeds 3] [--out monarch_training.png]
python examples/train_monarch.py --large --device cuda

The models are transformers that differ in the linear layers of their blocks (attention and MLP;
embedding and head are dense in all) and in their width:

    dense                     the yardstick
    Monarch, same width       fewer parameters and FLOPs
    Monarch, equal FLOPs      the widest that costs no more than the dense one
    Monarch, equal parameters the widest that has no more of them than the dense one

On which text and how is said in language_model.py. At the end: a table, and a picture of the
validation loss by step and time.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from language_model import (
    BYTES,
    LARGE,
    Contender,
    Device,
    LanguageModel,
    Large,
    Layer,
    Plan,
    Rate,
    Seeds,
    Steps,
    Width,
    curve,
    dense_layer,
    panels,
    save,
    show,
    table,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

import structmat as sm

HEAD = 32  # features of an attention head
SMALL = Plan(128, depth=4, context=128, batch=16, steps=300, evaluations=15, validation=64, lr=4e-3)


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


class Transformer(LanguageModel):
    def __init__(self, width: int, plan: Plan, layer: Layer) -> None:
        blocks = [Block(width, layer) for _ in range(plan.depth)]
        super().__init__(plan.context, blocks, nn.LayerNorm(width), nn.Linear(width, BYTES))
        self.places = nn.Embedding(plan.context, width)

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) + self.places.weight[: tokens.shape[1]]


def contenders(plan: Plan, blocks: int | None) -> list[Contender]:
    def dense() -> Transformer:
        return Transformer(plan.width, plan, dense_layer)

    def monarch(width: int) -> Transformer:
        return Transformer(width, plan, lambda n, m: sm.nn.MonarchLinear(n, m, blocks))

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


def picture(plan: Plan, runners: list[Contender], path: Path) -> None:
    """Loss against steps and time.

    The unit of time is the dense model's training. The steps of all took turns, yet on a machine
    that others use, steps of many small products are slowed more than others.
    """
    figure, (by_step, by_time) = panels(sharey=True)
    steps = plan.evaluated()
    for runner in runners:
        pace = runner.time / runners[0].time / plan.steps
        curve(by_step, steps, runner)
        curve(by_time, [step * pace for step in steps], runner)
    by_step.set(xlabel="step", ylabel="validation loss, nats a byte")
    by_time.set(xlabel="time, that of the dense model = 1")
    by_step.legend(frameon=False)
    save(figure, path)


def main(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path(
        "monarch_training.png"
    ),
    device: Device = "cpu",
    large: Large = False,
    seeds: Seeds = 1,
    steps: Steps = None,
    width: Width = None,
    lr: Rate = None,
    blocks: Annotated[int | None, typer.Option(help="Monarch blocks; each layer's own.")] = None,
) -> None:
    """Trains dense and Monarch language models and compares them."""
    plan = (LARGE if large else SMALL).changed(steps=steps, width=width, lr=lr)
    runners = contenders(plan, blocks)
    train(plan, runners, seeds, device)
    show(table(runners))
    picture(plan, runners, out)
    show(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
