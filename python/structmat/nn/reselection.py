# SPDX-License-Identifier: Apache-2.0
"""What stays of a sparse weight, and of its optimizer's state, when its support moves."""

from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..sparse_pattern import SparsePattern


@dataclass(frozen=True)
class Reselection:
    """The change of a support, as :meth:`SparseLowRankLinear.reselect` made it.

    Attributes:
        values: the parameter whose support it was.
        before, after: the numbers of entries.
        old, new: positions of the entries that stayed, among the old and the new values.

    Example:
        >>> import torch, structmat as sm
        >>> layer = sm.nn.SparseLowRankLinear(64, 32, rank=4, density=0.1)
        >>> moved = layer.reselect(torch.rand(32, 64))
        >>> moved.before, moved.after, len(moved.old) == len(moved.new)
        (205, 205, True)
    """

    values: nn.Parameter
    before: int
    after: int
    old: Tensor
    new: Tensor
    _carried: "WeakSet[torch.optim.Optimizer]" = field(
        default_factory=WeakSet, init=False, repr=False, compare=False
    )

    @classmethod
    def between(
        cls, before: SparsePattern, after: SparsePattern, values: nn.Parameter
    ) -> "Reselection":
        """From one support of a matrix to another. Positions ascend, so that each is searched."""
        was, now = before._flat(), after._flat()
        place = torch.searchsorted(was, now).clamp_max_(max(before.nnz - 1, 0))
        if before.nnz == 0:
            empty = now[:0]
            return cls(values, 0, after.nnz, empty, empty)
        new = (was[place] == now).nonzero()[:, 0]
        return cls(values, before.nnz, after.nnz, place[new], new)

    def carry(self, state: Tensor) -> Tensor:
        """Numbers of the old entries ``(before,)`` as those of the new ones, zero where there were
        none."""
        carried = state.new_zeros(self.after)
        carried[self.new] = state[self.old]
        return carried

    @torch.no_grad()
    def carry_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves what an optimizer holds for each value, such as the moments of Adam, with the
        entries that stayed; it is zero for new ones. Tensors of other shapes, such as the count of
        steps, stay as they are. Call it once for each optimizer, before the next step.

        Raises:
            TypeError: no ``torch.optim.Optimizer``.
            ValueError: an optimizer that does not hold the parameter.
            RuntimeError: its state was moved before.
        """
        op = "Reselection.carry_optimizer_state"
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{op}: optimizer is no torch.optim.Optimizer")
        groups = optimizer.param_groups
        if not any(parameter is self.values for group in groups for parameter in group["params"]):
            raise ValueError(f"{op}: the optimizer does not hold the values of the layer")
        if optimizer in self._carried:
            raise RuntimeError(f"{op}: the state of this optimizer was carried before")
        self._carried.add(optimizer)
        state = optimizer.state.get(self.values, {})
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.shape == (self.before,):
                state[name] = self.carry(tensor)
