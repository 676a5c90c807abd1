# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is a Monarch matrix: two block-diagonal factors and a permutation."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import monarch, ops
from ..linalg.svd import check_integer
from .blocks import Blocks, check_dtype, check_sizes
from .convert import dense_like, finite_rows, finite_weight
from .product import product


class MonarchLinear(nn.Module):
    """A linear layer with a Monarch weight of ``N x N`` blocks, each of rank ``R`` at most.

    The ``n`` inputs are ``N`` blocks of ``I``, the ``m`` outputs ``N`` blocks of ``L``, and

    ``h[k,j,r] = sum_i W1[k,j,r,i] x[k,i]``, ``y[j,l] = sum_kr W2[j,l,k,r] h[k,j,r] + bias[j,l]``

    with ``H = N^2 R`` hidden units: ``H (I + L)`` weights instead of ``m n``, a share of ``2 / N``
    for a square layer with ``H = n``.

    Args:
        in_features: ``n``.
        out_features: ``m``.
        n_blocks: ``N``, from 1 to ``min(m, n)``. By default chosen for speed: of the counts from a
            third of ``sqrt(min(m, n))``, but 4 at least, to that root, beyond which more blocks are
            more weights again, those whose blocks ``I`` and ``L`` are multiples of 64; the largest
            of them, which has the fewest weights. Where there is none, multiples of 32, 16
            and 8 are tried, then any count that divides both sizes, and then blocks of 64 or a
            little more on the smaller side are taken. 768 features make 12 blocks, 1,024 make 16,
            4,096 make 64.
        bias: add a learned bias.
        rank: ``R``, from 1 to ``min(I, L)``. By default the least that lets ``W`` have full rank,
            ``ceil(min(m, n) / N^2)``: about ``min(m, n)`` hidden units, as in the published layer.
        device, dtype: of the parameters.

    Sizes that ``N`` does not divide are made of blocks of ``I`` (``L``) and of one feature less,
    which are padded by a zero at the end. Weights that meet the padding are zero; their gradients
    are, and so they stay zero in training. Padding and cutting copy ``x`` and ``y`` once; a count
    that divides does not.

    Attributes:
        W1: ``(N, N, R, I)``, the first factor, ``I = ceil(n / N)``.
        W2: ``(N, L, N, R)``, the second factor, ``L = ceil(m / N)``.
        bias: ``(m,)`` or ``None``.
        weight: ``W (m, n)``, computed when it is used.

    Raises:
        TypeError: a size is no integer, or dtype none of float32, float64, bfloat16 and float16.
        ValueError: a size is below one, ``n_blocks`` above ``min(m, n)``, or ``rank`` above
            ``min(I, L)``, where blocks have full rank already.

    Cost: ``2 H (I + L)`` FLOPs a row, see :func:`structmat.ops.monarch_linear`.

    The matrices are those of Dao et al., Monarch: Expressive Structured Matrices for Efficient and
    Accurate Training, 2022, with blocked outputs and for any rank.

    Example:
        >>> import torch, structmat as sm
        >>> layer = sm.nn.MonarchLinear(1024, 4096)
        >>> layer
        MonarchLinear(in_features=1024, out_features=4096, n_blocks=16, rank=4, bias=True)
        >>> layer(torch.randn(5, 1024)).shape
        torch.Size([5, 4096])
        >>> (layer.W1.numel() + layer.W2.numel()) / (1024 * 4096)
        0.078125
        >>> dense = torch.nn.Linear(32, 48)
        >>> full = sm.nn.MonarchLinear.from_linear(dense, 4, rank=8)  # blocks of full rank
        >>> torch.allclose(full.to_linear().weight, dense.weight, atol=1e-5)
        True
    """

    W1: nn.Parameter
    W2: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_blocks: int | None = None,
        bias: bool = True,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MonarchLinear", in_features, out_features, n_blocks)
        check_dtype("MonarchLinear", dtype)
        if n_blocks is None:
            n_blocks = _default_blocks(in_features, out_features)
        self.in_features, self.out_features, self.n_blocks = in_features, out_features, n_blocks
        self._inputs, self._outputs = Blocks(in_features, n_blocks), Blocks(out_features, n_blocks)
        I, L = self._inputs.width, self._outputs.width
        if rank is None:
            rank = -(-min(in_features, out_features) // n_blocks**2)
        check_integer("rank", rank, "MonarchLinear")
        if not 1 <= rank <= min(I, L):
            raise ValueError(
                f"MonarchLinear: rank must be from 1 to {min(I, L)} for blocks of {L} x {I}, "
                f"got {rank}"
            )
        self.rank = rank
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W1 = nn.Parameter(torch.empty(n_blocks, n_blocks, rank, I, **like))
        self.W2 = nn.Parameter(torch.empty(n_blocks, L, n_blocks, rank, **like))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **like))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``W1 ~ N(0, 1/I)``, ``W2 ~ N(0, 1/(N R))``, and sets the bias to zero.

        Hidden units and outputs then have the mean square of the inputs, for any ``n``, ``m``,
        ``N`` and ``R``. (The published layer's uniform draws in each factor divide it by nine.)
        Each factor is drawn by its own fan-in, ``I`` and ``N R``, instead of ``n``. muP would draw
        a factor with fewer outputs than inputs smaller yet, by the root of their ratio, so that
        its spectral norm stays bounded. By fan-in a learning rate of Adam that suits a dense layer
        suits ``W1`` if multiplied by ``n / (2 I)`` and ``W2`` by ``n / (2 N R)`` (Qiu et al.,
        Compute Better Spent, 2024).
        """
        nn.init.normal_(self.W1, std=1 / math.sqrt(self._inputs.width))
        nn.init.normal_(self.W2, std=1 / math.sqrt(self.n_blocks * self.rank))
        if short := self._inputs.short:
            with torch.no_grad():
                self.W1[-short:] *= math.sqrt(self._inputs.width / (self._inputs.width - 1))
        self._clear_padding()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        if self._inputs.short:
            self.W1[-self._inputs.short :, ..., -1] = 0
        if self._outputs.short:
            self.W2[-self._outputs.short :, -1] = 0

    @property
    def weight(self) -> Tensor:
        """``W (m, n)``, for code that reads the weight of a dense layer. Not a parameter.

        Its dtype, device and shape cost nothing; any other use computes the product, ``2 m n R``
        FLOPs each time and ``m n`` numbers of memory, and gradients flow to ``W1`` and ``W2``.

        Raises:
            RuntimeError: it is written to, which would change neither. ``weight.data`` and
                ``weight.detach()`` are copies, and can be.
        """
        shape = self.out_features, self.in_features
        return product("MonarchLinear", shape, {"W1": self.W1, "W2": self.W2}, self._dense)

    def _dense(self, W1: Tensor, W2: Tensor) -> Tensor:
        return self._inputs.cut(self._outputs.cut(monarch.to_dense(W1, W2).T).T)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self._outputs.pad(self.bias)
        y = ops.monarch_linear(self._inputs.pad(x, "MonarchLinear"), self.W1, self.W2, bias)
        return self._outputs.cut(y)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        n_blocks: int | None = None,
        *,
        rank: int | None = None,
        inputs: Tensor | None = None,
    ) -> "MonarchLinear":
        """The best layer of a block count and rank for a given ``nn.Linear``, of its dtype and
        device.

        Args:
            linear: the dense layer, left as it is.
            n_blocks, rank: as those of the constructor.
            inputs: ``(..., n)``, samples of what the layer is fed. The output error
                ``||X W^T - X W'^T||_F`` on them is then lowered to near a stationary point;
                without them ``||W - W'||_F`` is the least possible. Rank that the samples, if few,
                have no use for goes to the weight. See :func:`structmat.monarch.project`.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or ``inputs`` no tensor.
            ValueError: bad ``n_blocks`` or ``rank``, no rows in ``inputs``, wrong width, NaN or
                Inf in either.
        """
        op = "MonarchLinear.from_linear"
        W = finite_weight(op, linear)
        m, n = W.shape
        layer = cls(n, m, n_blocks, rank=rank, bias=False, device="meta")
        N, ins, outs = layer.n_blocks, layer._inputs, layer._outputs
        moments = None
        if inputs is not None:
            rows = ins.pad(finite_rows(op, linear, inputs))
            moments = rows.T @ rows
        W1, W2 = monarch.project(outs.pad(ins.pad(W).T).T, N, N, layer.rank, inputs=moments)
        layer.W1 = nn.Parameter(W1.to(W, copy=True).contiguous())
        layer.W2 = nn.Parameter(W2.to(W, copy=True).contiguous())
        layer._clear_padding()
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same ``W``, of the same dtype and device."""
        W1, W2 = self.W1.detach(), self.W2.detach()
        return dense_like(self, self._dense(W1.double(), W2.double()), W1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"n_blocks={self.n_blocks}, rank={self.rank}, bias={self.bias is not None}"
        )


def _default_blocks(n: int, m: int) -> int:
    """The rule of MonarchLinear's documentation.

    64 is where a product of blocks comes near the rate of a large one on CPUs, and GPUs are bound
    by memory up to about 200: smaller blocks would cost weights and gain no time.
    """
    most = math.isqrt(min(n, m))
    least = max(min(4, most), most // 3)
    for multiple in (64, 32, 16, 8, 1):
        for count in range(most, least - 1, -1):
            if n % (count * multiple) == 0 and m % (count * multiple) == 0:
                return count
    return max(least, min(most, min(n, m) // 64))
