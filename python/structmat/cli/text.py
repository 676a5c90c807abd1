# SPDX-License-Identifier: Apache-2.0
"""Models and calibration text for ``structmat compress``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structmat.cli.errors import UserError

_BATCH = 16
_MAX_TOKENS = 512  # longer passages add tokens, not kinds of input


def quiet_transformers() -> None:
    """No progress bars and advice from transformers: the commands have their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(name: str, device: torch.device) -> nn.Module:
    """The model of a transformers folder or name, in the architecture and dtype it was saved with.

    Raises:
        UserError: there is none.
    """
    import transformers

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no model folder: it has no config.json")
        name = str(folder)
    elif folder.exists() or folder.is_absolute() or name.count("/") > 1 or name.startswith("."):
        raise UserError(f"no such model folder: {name}")
    quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        wanted = (config.architectures or [""])[0]
        # the class it was saved as: AutoModel would drop its head
        architecture = getattr(transformers, wanted, transformers.AutoModel)
        model: nn.Module = architecture.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        # transformers explains at length, and talks of a network where a name was mistyped
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"transformers cannot load {name!r}: {reason}") from None
    return model.to(device).eval()


def read_passages(file: Path) -> list[str]:
    """The passages of a text file, one a line, or the "text" fields of a .jsonl file.

    Raises:
        UserError: no such file, not text, a line without "text", or nothing in it.
    """
    if not file.is_file():
        raise UserError(f"no such calibration file: {file}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text") from None
    if file.suffix == ".jsonl":
        lines = [_text_of(line, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise UserError(f"{file} holds no calibration text")
    return passages


def _text_of(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{place} is not a JSON object with a string "text"')
    return text


class Batches:
    """Token batches of the passages; iterated as often as the compression needs, same each time."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        passages: list[str],
        on_batch: Callable[[int, int], None],
    ) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"transformers finds no tokenizer with {name!r}: {reason}") from None
        if tokenizer.pad_token is None:  # GPT-2 and kin; padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        config: Any = model.config
        longest = min(
            _MAX_TOKENS,
            tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", None) or _MAX_TOKENS,
        )
        passages = sorted(passages, key=len)  # like lengths together: little padding
        device = next(model.parameters()).device
        self.tokenizer = tokenizer
        self.batches: list[dict[str, Tensor]] = [
            tokenizer(
                passages[start : start + _BATCH],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(device)
            for start in range(0, len(passages), _BATCH)
        ]
        self._on_batch = on_batch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(self.batches, 1):
            yield dict(batch)
            self._on_batch(index, len(self.batches))

    def __call__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self)
