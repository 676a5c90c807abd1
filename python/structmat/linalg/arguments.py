# SPDX-License-Identifier: Apache-2.0
"""What :func:`randomized_svd` accepts besides dense tensors of one process."""

import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .svd import _DTYPES, check_integer, check_options, check_target

_OP = "randomized_svd"


def check(
    A: Any,
    rank: int | None,
    rtol: float | None,
    oversample: int | None,
    sweeps: int | None,
    center: bool,
    seed: int,
    group: Any,
) -> None:
    if rank is not None:
        check_integer("rank", rank)
    check_options(oversample, sweeps, seed, center)
    check_target(rank, rtol)
    if rank is not None and rank < 1:
        raise ValueError(f"{_OP}: rank is {rank}, wanted at least 1")
    if isinstance(A, Tensor):
        _check_tensor(A, group)
    else:
        _check_products(A)
    if group is not None and hasattr(A, "device_mesh"):
        raise ValueError(f"{_OP}: A is a DTensor, which brings its own group; wanted no group")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{_OP}: group must be a ProcessGroup, got {type(group).__name__}")


def _check_tensor(A: Tensor, group: Any) -> None:
    if A.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(
            f"{_OP}: A has layout {A.layout}, wanted a dense or CSR tensor; see to_sparse_csr()"
        )
    if A.dtype not in _DTYPES:
        raise TypeError(f"{_OP}: A is {A.dtype}, wanted one of " + ", ".join(map(str, _DTYPES)))
    if A.dim() != 2:
        raise ValueError(f"{_OP}: A must have 2 dimensions, got {A.dim()}")
    if A.layout == torch.sparse_csr and A.values().dim() != 1:
        raise ValueError(f"{_OP}: A's values have {A.values().dim()} dimensions, wanted 1")
    if A.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{_OP}: A requires grad, but has no gradient here; pass A.detach()")


def _check_products(A: Any) -> None:
    names = ("shape", "dtype", "device", "matmat", "rmatmat")
    missing = [name for name in names if not hasattr(A, name)]
    if missing:
        raise TypeError(
            f"{_OP}: A is a {type(A).__name__} without {', '.join(missing)}; wanted a dense "
            "tensor, a CSR tensor or an object with .shape .dtype .device .matmat(X) .rmatmat(Y)"
            + ("; see torch.from_numpy" if hasattr(A, "__array__") or hasattr(A, "indptr") else "")
        )
    try:
        sizes = tuple(operator.index(size) for size in A.shape)
    except TypeError:
        raise TypeError(f"{_OP}: A.shape is {A.shape}, wanted two integers") from None
    if len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(f"{_OP}: A.shape is {sizes}, wanted (m, n)")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{_OP}: A.dtype is {A.dtype}, wanted torch.float32 or torch.float64, that of the "
            "blocks its products take and return"
        )
    try:
        torch.device(A.device)
    except (TypeError, RuntimeError):
        raise TypeError(f"{_OP}: A.device is {A.device!r}, wanted a torch.device") from None
