# SPDX-License-Identifier: Apache-2.0
"""Trains small language models from scratch: dense layers against Monarch layers.

python examples/train_monarch.py [--seeds 3] [--out monarch_training.png]
python examples/train_monarch.py --large --device cuda

The text is the Python standard library's own source code, which is on every machine, as bytes; every
eighth file is kept for validation. The models are transformers that differ in their linear layers
(attention and MLP; embedding and head are dense in all) and in size:

    dense                  the yardstick
    Monarch, same width    as wide and deep as the dense one
    Monarch, equal FLOPs   the widest that costs no more than the dense one
    Monarch, equal size    as wide as the dense one, with more blocks up to its number of parameters

All see the same batches in turn, step by step, so that a busy machine slows all of them alike. At
the end: a table and a picture of the validation loss by step and by time.
"""

import math
import statistics
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
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
    fan_in: dict[nn.Parameter, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fan_in[module.weight] = module.in_features
        elif isinstance(module, sm.nn.MonarchLinear):
            fan_in[module.W1] = 2 * module.W1.shape[3]
            fan_in[module.W2] = 2 * module.n_blocks * module.rank
    groups = [{"params": [p], "lr": lr * 128 / n} for p, n in fan_in.items()]
    others = [p for p in model.parameters() if p not in fan_in]
    return [*groups, {"params": others, "lr": lr, "weight_decay": 0.0}]
