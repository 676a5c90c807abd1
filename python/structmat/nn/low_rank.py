# SPDX-License-Identifier: Apache-2.0
"""``y = x V^T U^T + b``: a linear layer whose weight is the product of two thin factors."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..linalg.svd import check_integer
from .blocks import check_dtype, check_sizes
from .convert import dense_like, finite_rows, finite_weight
from .product import product


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
        weight: ``U V (m, n)``, computed when it is used.

    Raises:
        TypeError: a size is no integer, or dtype none of float32, float64, bfloat16 and float16.
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
        check_sizes("LowRankLinear", in_features, out_features, None)
        check_integer("rank", rank, "LowRankLinear")
        check_dtype("LowRankLinear", dtype)
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

    @property
    def weight(self) -> Tensor:
        """``W = U V``, for code that reads the weight of a dense layer. Not a parameter.

        Its dtype, device and shape cost nothing; any other use computes the product, ``2 m n r``
        FLOPs each time and ``m n`` numbers of memory, and gradients flow to ``U`` and ``V``.

        Raises:
            RuntimeError: it is written to, which would change neither. ``weight.data`` and
                ``weight.detach()`` are copies, and can be.
        """
        shape = self.out_features, self.in_features
        return product("LowRankLinear", shape, {"U": self.U, "V": self.V}, torch.matmul)

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
            TypeError: ``linear`` is no ``nn.Linear``, ``inputs`` no tensor, or ``rank`` no integer.
            ValueError: bad rank, no rows in ``inputs``, wrong width, NaN or Inf in either.
        """
        from ..compress import factor

        W = finite_weight("LowRankLinear.from_linear", linear)
        check_integer("rank", rank, "LowRankLinear.from_linear")
        if not 1 <= rank <= min(W.shape):
            raise ValueError(
                f"LowRankLinear.from_linear: rank must be from 1 to {min(W.shape)}, got {rank}"
            )
        if inputs is None:
            factors = factor.svd(W)
        else:
            rows = finite_rows("LowRankLinear.from_linear", linear, inputs)
            small = rows if factor.on_input_side(W) else rows @ W.double().T
            factors = factor.whitened(W, small.T @ small)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        layer = cls._of(factors.U[:, :rank], factors.V[:rank], bias, W)
        return layer.train(linear.training)

    @classmethod
    def _of(cls, U: Tensor, V: Tensor, bias: nn.Parameter | None, like: Tensor) -> "LowRankLinear":
        """A layer with copies of the factors, of the dtype and device of ``like``, and this bias.

        Made on the meta device first: no random numbers are drawn.
        """
        layer = cls(V.shape[1], U.shape[0], U.shape[1], bias=False, device="meta")
        layer.U = nn.Parameter(U.detach().to(like, copy=True).contiguous())
        layer.V = nn.Parameter(V.detach().to(like, copy=True).contiguous())
        layer.bias = bias
        return layer

    def to_linear(self) -> nn.Linear:
        """The dense layer with ``W = U V``, of the same dtype and device."""
        return dense_like(self, self.U.detach().double() @ self.V.detach().double(), self.U)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
