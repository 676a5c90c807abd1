# SPDX-License-Identifier: Apache-2.0
"""Models and calibration text for ``structmat compress``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structmat.cli.errors import UserError

Batch = dict[str, Tensor]
Objective = Callable[[Any, Batch], Tensor]

_BATCH = 16
_MAX_TOKENS = 512  # longer passages add tokens, not kinds of input


def quiet_transformers() -> None:
    """No progress bars and advice from transformers: the commands have their own."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # else a line for every time it tries the network again
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(name: str, device: torch.device) -> nn.Module:
    """The model of a transformers folder or name, in the architecture and dtype it was saved with.

    Raises:
        UserError: there is none, or weights are missing.
    """
    import transformers

    where = ""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no model folder: it has no config.json")
        name = str(folder)
    elif folder.exists() or folder.is_absolute() or name.count("/") > 1 or name.startswith("."):
        raise UserError(f"no such model folder: {name}")
    else:
        where = " (no such folder here)"
    quiet_transformers()
    torch.manual_seed(0)  # a pooler that was not saved is drawn anew: the same each time
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        wanted = (config.architectures or [""])[0]
        # the class it was saved as: AutoModel would drop its head
        architecture = getattr(transformers, wanted, transformers.AutoModel)
        model, found = architecture.from_pretrained(
            name, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        # transformers explains at length, and talks of a network where a name was mistyped
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"transformers cannot load {name!r}{where}: {reason}") from None
    _refuse_missing(name, model, found)
    return model.to(device).eval()


def _refuse_missing(name: str, model: Any, found: dict[str, Any]) -> None:
    """Transformers draws weights that the file lacks, or has in another shape, at random."""
    missing = {entry if isinstance(entry, str) else entry[0] for entry in found["mismatched_keys"]}
    missing |= set(found["missing_keys"])
    if model.base_model is model:  # often saved without its pooler, which hidden states need not
        missing = {key for key in missing if not key.startswith("pooler.")}
    if missing:
        first, more = ", ".join(sorted(missing)[:2]), len(missing) - 2
        raise UserError(f"{name} has no weights for {first}{f' (and {more} more)' * (more > 0)}")


def read_passages(file: Path) -> list[str]:
    """The passages of a text file, one a line, or the "text" fields of a .jsonl file.

    Raises:
        UserError: no such file, not text, a line without "text", or nothing in it.
    """
    if not file.is_file():
        raise UserError(f"no such calibration file: {file}")
    try:
        # splitlines() would also split at form feeds and U+2028, which passages may hold
        lines = file.read_text(encoding="utf-8-sig").split("\n")
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


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model, able to pad.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    files = (file for kind in ("token*", "vocab*", "*.model") for file in folder.glob(kind))
    # transformers would make up one that knows no word
    if folder.is_dir() and next(files, None) is None:
        raise UserError(f"{folder} holds no tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"transformers finds no tokenizer with {name!r}: {reason}") from None
    if tokenizer.pad_token is None:  # GPT-2 and kin; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def batches_of(passages: list[str], tokenizer: Any, config: Any) -> list[Batch]:
    """Padded batches, passages of like length together, cut at what the model takes."""
    longest = min(
        _MAX_TOKENS,
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None) or _MAX_TOKENS,
    )
    passages = sorted(passages, key=len)
    return [
        dict(
            tokenizer(
                passages[start : start + _BATCH],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
        )
        for start in range(0, len(passages), _BATCH)
    ]


def loss_for(model: nn.Module, batches: list[Batch]) -> tuple[list[Batch], Objective | None]:
    """Batches and objective of a loss that text alone defines, for ``--method fisher``.

    Causal language models: their next-token loss. Models that return hidden states: a contrastive
    one, in which the first half of a passage is to find its second half among those of its batch.

    Raises:
        UserError: neither fits the model.
    """
    config: Any = model.config
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return [{**batch, "labels": _labels(batch)} for batch in batches], None
    if not name.endswith("Model") or config.is_encoder_decoder:
        raise UserError(
            f"--method fisher knows no loss for {name}; use --method whitened, or "
            "structmat.compress with an objective of your own"
        )
    return batches, _halves_agree


def _labels(batch: Batch) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def _halves_agree(output: Any, batch: Batch) -> Tensor:
    """``mean_i -log softmax_j(a_i . b_j / 0.05)_i``, unit means of first and second halves."""
    mask = batch["attention_mask"]
    position = mask.cumsum(1)
    first = mask * (2 * position <= mask.sum(1, keepdim=True))
    halves = []
    for part in (first, mask - first):
        weight = part.unsqueeze(-1).to(output.last_hidden_state)
        mean = (output.last_hidden_state * weight).sum(1) / weight.sum(1).clamp_min(1)
        halves.append(nn.functional.normalize(mean, dim=-1))
    scores = halves[0] @ halves[1].T / 0.05
    return nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
