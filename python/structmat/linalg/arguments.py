# SPDX-License-Identifier: Apache-2.0
"""What :func:`randomized_svd` accepts besides dense tensors of one process."""

import operator
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .operands import working_dtype
from .svd import _DTYPES, check_integer, check_not_meta, check_options, check_target

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
    check_matrix(A, _OP)
    if group is not None and hasattr(A, "device_mesh"):
        raise ValueError(f"{_OP}: A is a DTensor, which brings its own group; wanted no group")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{_OP}: group must be a ProcessGroup, got {type(group).__name__}")


def check_matrix(A: Any, op: str) -> None:
    """Raises for what has no products, or not those of a matrix."""
    if isinstance(A, Tensor):
        _check_tensor(A, op)
    else:
        _check_products(A, op)
    check_not_meta("A", torch.device(A.device), op)


def check_factors(A: Any, U: Tensor, Vh: Tensor) -> None:
    """Raises where these are not the factors of A."""
    if U.dim() != 2 or tuple(A.shape) != (len(U), Vh.shape[-1]):
        raise ValueError(
            f"residuals: A has shape {tuple(A.shape)}, the factors {tuple(U.shape)} and "
            f"{tuple(Vh.shape)}; wanted the one matrix they came from"
        )
    if working_dtype(A.dtype) != U.dtype:
        raise TypeError(
            f"residuals: A is {A.dtype}, the factors {U.dtype}; wanted A as it was decomposed"
        )
    if torch.empty(0, device=A.device).device != U.device:  # "cuda" is the current one
        raise ValueError(f"residuals: A is on {A.device}, the factors on {U.device}")


def _check_tensor(A: Tensor, op: str) -> None:
    if A.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(
            f"{op}: A has layout {A.layout}, wanted a dense or CSR tensor; see to_sparse_csr()"
        )
    if A.dtype not in _DTYPES:
        raise TypeError(f"{op}: A is {A.dtype}, wanted one of " + ", ".join(map(str, _DTYPES)))
    if A.dim() != 2:
        raise ValueError(f"{op}: A must have 2 dimensions, got {A.dim()}")
    if A.layout == torch.sparse_csr and A.values().dim() != 1:
        raise ValueError(f"{op}: A's values have {A.values().dim()} dimensions, wanted 1")
    if A.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: A requires grad, but has no gradient here; pass A.detach()")


def _check_products(A: Any, op: str) -> None:
    names = ("shape", "dtype", "device", "matmat", "rmatmat")
    missing = [name for name in names if not hasattr(A, name)]
    if missing:
        raise TypeError(
            f"{op}: A is a {type(A).__name__} without {', '.join(missing)}; wanted a dense "
            "tensor, a CSR tensor or an object with .shape .dtype .device .matmat(X) .rmatmat(Y)"
            + ("; see torch.from_numpy" if hasattr(A, "__array__") or hasattr(A, "indptr") else "")
            + ("; svd_out_of_core reads files" if isinstance(A, (str, bytes, os.PathLike)) else "")
        )
    try:
        sizes = tuple(operator.index(size) for size in A.shape)
    except TypeError:
        raise TypeError(f"{op}: A.shape is {A.shape}, wanted two integers") from None
    if len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(f"{op}: A.shape is {sizes}, wanted (m, n)")
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: A.dtype is {A.dtype}, wanted torch.float32 or torch.float64, that of the "
            "blocks its products take and return"
        )
    try:
        torch.device(A.device)
    except (TypeError, RuntimeError):
        raise TypeError(f"{op}: A.device is {A.device!r}, wanted a torch.device") from None
