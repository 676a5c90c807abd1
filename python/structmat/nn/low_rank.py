# SPDX-License-Identifier: Apache-2.0
"""``y = x V^T U^T + b``: a linear layer whose weight is the product of two thin factors."""

import math

import torch
from torch import Tensor, nn

from .. import ops


class LowRankLinear(nn.Module):
    """A linear layer with the weight ``W = U V`` of rank at most ``rank``.

    ``y = x V^T U^T + bias`` maps ``(..., n)`` to ``(..., m)`` with ``rank (m + n)`` weights instead
    of ``m n``: fewer for ``rank < m n / (m + n)``.

    Args:
        in_features: ``n``.
        out_features: ``m``.
        rank: ``r``, from 1 to ``min(m, n)``.
        bias: add a learned bias.
        device, dtype: of the parameters.

    Attributes:
        U: ``(m, r)``.
        V: ``(r, n)``. Layers made by :meth:`from_linear` and :func:`structmat.compress` order the
            pairs (column of ``U``, row of ``V``) by descending energy: a prefix of them is the best
            layer of that smaller rank.
        bias: ``(m,)`` or ``None``.

    Raises:
        ValueError: a size is below one, or ``rank`` above ``min(m, n)``.

    Cost: ``2 r (m + n)`` FLOPs a row, see :func:`structmat.ops.low_rank_linear`.

    Example:
        >>> import torch, structmat as sm
        >>> layer = sm.nn.LowRankLinear(64, 32, rank=8)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
        >>> dense = torch.nn.Linear(64, 32)
        >>> full = sm.nn.LowRankLinear.from_linear(dense, rank=32)
        >>> torch.allclose(full.to_linear().weight, dense.weight, atol=1e-5)
        True
    """

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"LowRankLinear: sizes must be positive, got {in_features} in, {out_features} out"
            )
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"LowRankLinear: rank must be from 1 to {min(in_features, out_features)} for "
                f"{in_features} in, {out_features} out, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``V ~ N(0, 1/n)``, ``U ~ N(0, 1/r)``, and sets the bias to zero.

        Both the ``r`` inner values and the outputs then have the mean square of the inputs, for any
        rank. (The default of ``nn.Linear``, ``U(-1/sqrt(n), 1/sqrt(n))`` in each factor, would
        divide it by nine.)
        """
        nn.init.normal_(self.V, std=1 / math.sqrt(self.in_features))
        nn.init.normal_(self.U, std=1 / math.sqrt(self.rank))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, self.U, self.V, self.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, *, inputs: Tensor | None = None
    ) -> "LowRankLinear":
        """The best layer of a rank for a given ``nn.Linear``, of its dtype and device.

        Args:
            linear: the dense layer, left as it is.
            rank: from 1 to ``min(m, n)``.
            inputs: ``(..., n)``, samples of what the layer is fed. The output error
                ``||X W^T - X W'^T||_F`` on them is then the least possible (see
                :func:`structmat.compress`, ``whitened``); without them ``||W - W'||_F`` is
                (truncated SVD).

        Raises:
            ValueError: bad rank, no rows in ``inputs``, wrong width, NaN or Inf in either.
        """
        from ..compress import factor

        W = linear.weight.detach()
        if not torch.isfinite(W).all():
            raise ValueError("LowRankLinear.from_linear: the weight has NaN or Inf")
        if inputs is None:
            factors = factor.svd(W)
        else:
            if inputs.shape[-1] != linear.in_features or inputs.numel() == 0:
                raise ValueError(
                    "LowRankLinear.from_linear: inputs must be (..., n) with at least one row and "
                    f"n = {linear.in_features}, got {tuple(inputs.shape)}"
                )
            rows = inputs.detach().reshape(-1, linear.in_features).to(W.device, torch.float64)
            if not torch.isfinite(rows).all():
                raise ValueError("LowRankLinear.from_linear: the inputs have NaN or Inf")
            small = rows if factor.on_input_side(W) else rows @ W.double().T
            factors = factor.whitened(W, small.T @ small)
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            device=W.device,
            dtype=W.dtype,
        )
        layer._set(factors.U[:, :rank], factors.V[:rank], linear.bias)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer with ``W = U V``, of the same dtype and device."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.U.device,
            dtype=self.U.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.U.double() @ self.V.double())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    @torch.no_grad()
    def _set(self, U: Tensor, V: Tensor, bias: Tensor | None) -> None:
        self.U.copy_(U)
        self.V.copy_(V)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
