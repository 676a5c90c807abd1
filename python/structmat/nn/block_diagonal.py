# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is block-diagonal."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..linalg.svd import check_integer
from .blocks import Blocks, check_dtype, check_sizes
from .convert import dense_like, finite_weight
from .product import product


class BlockDiagonalLinear(nn.Module):
    """A linear layer of ``N`` independent blocks: ``y[k] = W[k] x[k] + bias[k]``.

    The ``n`` inputs are ``N`` blocks of ``p``, the ``m`` outputs ``N`` blocks of ``q``, and block
    ``k`` of the outputs sees block ``k`` of the inputs alone: ``m n / N`` weights.

    Args:
        in_features: ``n``.
        out_features: ``m``.
        n_blocks: ``N``, from 1 to ``min(m, n)``.
        bias: add a learned bias.
        device, dtype: of the parameters.

    Sizes that ``N`` does not divide are made of blocks of ``p`` (``q``) and of one feature less,
    which are padded by a zero at the end. Weights that meet the padding are zero; their gradients
    are, and so they stay zero in training. Padding and cutting copy ``x`` and ``y`` once.

    Attributes:
        W: ``(N, q, p)``, ``q = ceil(m / N)``, ``p = ceil(n / N)``.
        bias: ``(m,)`` or ``None``.
        weight: the block-diagonal ``(m, n)`` matrix, made when it is used.

    Raises:
        TypeError: a size is no integer, or dtype none of float32, float64, bfloat16 and float16.
        ValueError: a size is below one, or ``n_blocks`` above ``min(m, n)``.

    Cost: ``2 m n / N`` FLOPs a row, see :func:`structmat.ops.block_diagonal_linear`.

    Example:
        >>> import torch, structmat as sm
        >>> layer = sm.nn.BlockDiagonalLinear(64, 32, n_blocks=4)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
        >>> y = torch.nn.functional.linear(torch.ones(64), torch.block_diag(*layer.W), layer.bias)
        >>> torch.allclose(layer(torch.ones(64)), y, atol=1e-5)
        True
    """

    W: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_blocks: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("n_blocks", n_blocks, "BlockDiagonalLinear")
        check_sizes("BlockDiagonalLinear", in_features, out_features, n_blocks)
        check_dtype("BlockDiagonalLinear", dtype)
        self.in_features, self.out_features, self.n_blocks = in_features, out_features, n_blocks
        self._inputs, self._outputs = Blocks(in_features, n_blocks), Blocks(out_features, n_blocks)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        q, p = self._outputs.width, self._inputs.width
        self.W = nn.Parameter(torch.empty(n_blocks, q, p, **like))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **like))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``W ~ N(0, 1/p)`` and sets the bias to zero.

        Outputs then have the mean square of the inputs.
        """
        nn.init.normal_(self.W, std=1 / math.sqrt(self._inputs.width))
        with torch.no_grad():
            if short := self._inputs.short:
                self.W[-short:] *= math.sqrt(self._inputs.width / (self._inputs.width - 1))
                self.W[-short:, :, -1] = 0
            if short := self._outputs.short:
                self.W[-short:, -1] = 0
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """The block-diagonal ``(m, n)`` matrix, for code that reads the weight of a dense layer.
        Not a parameter.

        Its dtype, device and shape cost nothing; any other use makes it, ``m n`` numbers, and
        gradients flow to ``W``.

        Raises:
            RuntimeError: it is written to, which would not change ``W``. ``weight.data`` and
                ``weight.detach()`` are copies, and can be.
        """
        shape = self.out_features, self.in_features
        return product("BlockDiagonalLinear", shape, {"W": self.W}, self._dense)

    def _dense(self, W: Tensor) -> Tensor:
        return self._inputs.cut(self._outputs.cut(torch.block_diag(*W).T).T)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self._outputs.pad(self.bias)
        y = ops.block_diagonal_linear(self._inputs.pad(x, "BlockDiagonalLinear"), self.W, bias)
        return self._outputs.cut(y)

    @classmethod
    def from_linear(cls, linear: nn.Linear, n_blocks: int) -> "BlockDiagonalLinear":
        """The diagonal blocks of a given ``nn.Linear``, the best such layer in Frobenius norm, of
        its dtype and device. What the blocks leave out of the weight is lost.

        Args:
            linear: the dense layer, left as it is.
            n_blocks: as that of the constructor.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``.
            ValueError: bad ``n_blocks``, NaN or Inf in the weight.
        """
        W = finite_weight("BlockDiagonalLinear.from_linear", linear)
        m, n = W.shape
        layer = cls(n, m, n_blocks, bias=False, device="meta")
        ins, outs = layer._inputs, layer._outputs
        blocks = outs.pad(ins.pad(W).T).T.unflatten(1, (n_blocks, -1)).unflatten(0, (n_blocks, -1))
        layer.W = nn.Parameter(torch.einsum("kqkp->kqp", blocks).clone().contiguous())
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same weight, of the same dtype and device."""
        return dense_like(self, self._dense(self.W.detach()), self.W.detach())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"n_blocks={self.n_blocks}, bias={self.bias is not None}"
        )
