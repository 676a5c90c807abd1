# SPDX-License-Identifier: Apache-2.0
"""Second moments of activations and of gradients, summed while batches stream through a model.

No activation outlives its batch. Moments are products in float64, block by block. Those of the
gradients are float32 on the CPU (float64 on CUDA, where float32 may mean TF32), summed in float64.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .factor import on_input_side
from .layers import Target, bias_of

Batch = Any
Objective = Callable[[Any, Batch], Tensor]
Progress = Callable[[str, int, int], None]

_SAMPLE_ROWS = 16384  # for gradients
_BLOCK_ROWS = 4096  # converted to float64 at a time


class Calibration:
    """The user's batches, any number of times; what they are and how many rows they hold."""

    def __init__(self, data: Iterable[Batch] | Callable[[], Iterable[Batch]], model: nn.Module):
        single = isinstance(data, Mapping | Tensor | str | bytes)
        if single or not (callable(data) or isinstance(data, Iterable)):
            raise TypeError(
                "compress: calibration must be a list of batches, or a function that returns "
                f"them, got {type(data).__name__}"
            )
        if not callable(data) and isinstance(data, Iterator):
            data = list(data)
        self._data = data
        self._device = next(model.parameters()).device
        digest = hashlib.sha256()
        self.batches = 0
        self.tokens = 0
        for batch in self._pass():
            if isinstance(batch, str | bytes):
                raise TypeError(
                    "compress: calibration must be a list of batches of tensors, got a batch of "
                    f"type {type(batch).__name__}; tokenize texts first"
                )
            self.batches += 1
            self.tokens += _count(batch)
            _digest(digest, batch)
        if self.tokens == 0:
            raise ValueError(
                "compress: calibration is empty: no batch with a row that is no padding"
            )
        self.hash = digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for batch in self._pass():
            yield batch
            count += 1
        if count != self.batches:
            raise ValueError(
                f"compress: calibration gave {self.batches} batches at first and {count} in a "
                "later pass; a function must return a new iterator at each call"
            )

    def _pass(self) -> Iterator[Batch]:
        for batch in self._data() if callable(self._data) else self._data:
            yield _each(batch, lambda x: x.to(self._device))

    def sample(self, *, repeat: bool = False) -> Iterator[Batch]:
        """Evenly spaced batches, some 16,000 rows in all; ``repeat``: little data again."""
        stride = max(1, self.tokens // _SAMPLE_ROWS)
        for _ in range(self.repeats if repeat else 1):
            yield from (batch for i, batch in enumerate(self) if i % stride == 0)

    def sampled(self, *, repeat: bool = False) -> int:
        """Number of batches of :meth:`sample`."""
        stride = max(1, self.tokens // _SAMPLE_ROWS)
        return -(-self.batches // stride) * (self.repeats if repeat else 1)

    @property
    def repeats(self) -> int:
        """Random projections a sequence: more than one where there is little data."""
        return min(4, max(1, _SAMPLE_ROWS // self.tokens))


def run(model: nn.Module, batch: Batch) -> Any:
    """Calls the model: a mapping is keywords, a tuple or list arguments, a tensor one argument.

    The model gets copies of floating-point tensors, which it may write to.
    """
    batch = _each(batch, lambda x: x.clone() if x.is_floating_point() or x.is_inference() else x)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def main_output(output: Any) -> Tensor:
    """``logits`` or ``last_hidden_state``, else the first floating-point tensor of the output.

    Raises:
        ValueError: there is none.
    """
    if isinstance(output, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                return output[name]
    parts = [output] if isinstance(output, Tensor) else list(_values(output))
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ValueError(
        f"compress: no tensor found in the model's output ({type(output).__name__}); give "
        "objective, a function of (output, batch)"
    )


class Masks:
    """Which rows of a batch are no padding, as booleans ``(B, T)``: for a target, or the output.

    In an encoder-decoder model ``attention_mask`` is the encoder's and ``decoder_attention_mask``
    the decoder's; cross-attention, fed by both, has none.
    """

    def __init__(self, model: nn.Module, batch: Batch):
        self._batch = mask_of(batch)
        self._split = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.output = mask_of(batch, "decoder_attention_mask") if self._split else self._batch

    def of(self, target: Target) -> Tensor | None:
        parts = target.name.split(".")
        if not self._split or ("encoder" in parts and "decoder" not in parts):
            return self._batch
        inside = parts[parts.index("decoder") :] if "decoder" in parts else []
        crossed = any("enc" in part.lower() or "cross" in part.lower() for part in inside)
        return None if crossed else self.output


def mask_of(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """A mask of shape ``(B, T)`` as booleans, where the batch has one."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def sequences(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(sequences, rows, n)`` with padding set to zero; rows without a sequence stand alone."""
    if mask is not None:
        padding = ~mask.to(x.device)
        if x.ndim > 2 and x.shape[:2] == mask.shape:
            x = x.masked_fill(padding.reshape(*mask.shape, *[1] * (x.ndim - 2)), 0)
        elif x.ndim == 2 and x.shape[0] == mask.numel():
            x = x.masked_fill(padding.reshape(-1, 1), 0)
    if x.ndim == 2:
        return x.unsqueeze(1)
    return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])


def rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(rows, n)`` without padding."""
    if mask is not None:
        if x.ndim > 2 and x.shape[:2] == mask.shape:
            x = x[mask.to(x.device)]
        elif x.ndim == 2 and x.shape[0] == mask.numel():
            x = x[mask.flatten().to(x.device)]
    return x.reshape(-1, x.shape[-1])


def wide(x: Tensor) -> Tensor:
    """The type in which products of gradients are taken."""
    return x.double() if x.is_cuda or x.dtype == torch.float64 else x.float()


def without_bias(module: nn.Module, y: Tensor) -> Tensor:
    """``W x`` of a layer's output ``y``."""
    bias = bias_of(module)
    return y if bias is None else y - bias


def gram(x: Tensor, y: Tensor, shift: Tensor | None = None) -> Tensor:
    """``(x - shift)^T (y - shift)`` of two ``(rows, .)`` matrices in float64."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(_BLOCK_ROWS), y.split(_BLOCK_ROWS), strict=True):
        a, b = a.double(), b.double()
        if shift is not None:
            a, b = a - shift, b - shift
        total.addmm_(a.T, b)
    return total


def modules_of(targets: Iterable[Target]) -> list[tuple[Target, nn.Module]]:
    return [(target, module) for target in targets for module in target.modules]


@contextmanager
def observing(
    modules: Iterable[tuple[Target, nn.Module]],
    see: Callable[[Target, nn.Module, Tensor, Tensor], Tensor | None],
) -> Iterator[None]:
    """Calls ``see(target, module, x, y)`` after each module; a tensor returned replaces ``y``."""
    handles = []
    try:
        for target, module in modules:

            def hook(
                module: nn.Module, args: Any, kwargs: Any, y: Tensor, target: Target = target
            ) -> Tensor | None:
                return see(target, module, args[0] if args else next(iter(kwargs.values())), y)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and parameters without gradients, as they were before on leaving."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


def call_order(model: nn.Module, targets: list[Target], calibration: Calibration) -> list[Target]:
    """Targets in the order in which the first batch reaches them, then those it does not."""
    order: dict[Target, None] = {}

    def note(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> None:
        order.setdefault(target)

    with torch.no_grad(), observing(modules_of(targets), note):
        run(model, next(iter(calibration)))
    return list(order) + [target for target in targets if target not in order]


def moments(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration,
    step: Callable[[], None],
    *,
    on_inputs: bool = False,
) -> dict[Target, Tensor]:
    """``sum x x^T`` where ``n <= m`` or ``on_inputs``, else ``sum (W x)(W x)^T`` without bias.

    Raises:
        ValueError: NaN or Inf in an activation, or a layer that no batch reaches.
    """
    sums: dict[Target, Tensor] = {}
    last: list[Any] = []  # the tensor last seen, its version, its mask and its Gram matrix

    def see(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> None:
        mask = masks.of(target)
        if on_inputs or on_input_side(target.weight):
            # Query, key and value are fed the same tensor; a residual sum may write to it.
            if not (last and last[0] is x and last[1] == x._version and last[2] is mask):
                z = rows(x, mask)
                last[:] = x, x._version, mask, gram(z, z)
            product = last[3]
        else:
            z = rows(y, mask)
            product = gram(z, z, bias_of(module))
        sums[target] = sums[target].add_(product) if target in sums else product.clone()

    with torch.no_grad(), observing(modules_of(targets), see):
        for batch in calibration:
            masks = Masks(model, batch)
            run(model, batch)
            last.clear()
            step()
    check_reached(targets, sums)
    for target, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(f"compress: the activations of {target.name} have NaN or Inf")
    return sums


def check_reached(targets: Sequence[Target], found: Mapping[Target, Any]) -> None:
    for target in targets:
        if target not in found:
            raise ValueError(
                f"compress: no calibration batch reaches {target.name}; leave it out by filter"
            )


def _values(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, tuple | list) else ()


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _each(value, change) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_each(value, change) for value in batch)
    return batch


def _count(batch: Batch) -> int:
    mask = mask_of(batch)
    if mask is not None:
        return int(mask.sum())
    parts = [batch] if isinstance(batch, Tensor) else list(_values(batch))
    for part in parts:
        if isinstance(part, Tensor):  # ids (B, T), or features (..., n)
            return part[..., :1].numel() if part.is_floating_point() else part.numel()
    return 0


def _digest(digest: Any, batch: Batch) -> None:
    if isinstance(batch, Tensor):
        data = batch.detach().cpu().contiguous()
        digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(batch, Mapping):
        for name in sorted(batch):
            digest.update(name.encode())
            _digest(digest, batch[name])
    elif isinstance(batch, tuple | list):
        for value in batch:
            _digest(digest, value)
    else:
        digest.update(repr(batch).encode())
