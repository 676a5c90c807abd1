# SPDX-License-Identifier: Apache-2.0
"""``structmat svd``: the truncated SVD of a matrix in a file."""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from structmat import linalg
from structmat.cli.errors import UserError, reports_errors, require
from structmat.cli.output import new_file, print_json, progress

_FLOATS = ("float64", "float32", "float16")


@reports_errors
def svd(
    matrix: Annotated[
        Path, typer.Argument(help="A .npy file: a matrix of floats.", metavar="A.npy")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new .safetensors file.")],
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Singular values to keep.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Relative error wanted, in place of a rank.")
    ] = None,
    center: Annotated[
        bool, typer.Option("--center", help="Subtract the mean of the rows.")
    ] = False,
    out_of_core: Annotated[
        bool | None,
        typer.Option(
            "--out-of-core/--in-memory",
            help="Read A in blocks, twice. Default: if A takes over half the memory.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random sketch.")] = 0,
    sweeps: Annotated[
        int | None, typer.Option(help="Passes over A. Default: chosen for accuracy.")
    ] = None,
    oversample: Annotated[
        int | None, typer.Option(help="Sketch columns beyond the rank. Default: chosen.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Factor A (m, n) into U (m, k), S (k), Vh (k, n) with A = U diag(S) Vh, best at rank k."""
    require("safetensors")
    from safetensors.torch import save_file

    started = time.perf_counter()
    if (rank is None) == (rtol is None):
        raise UserError("wants either --rank or --rtol")
    a = _read(matrix)
    if rank is not None and not 1 <= rank <= min(a.shape):
        raise UserError(
            f"--rank must lie between 1 and {min(a.shape)}, the smaller side of A, got {rank}"
        )
    if out_of_core is None:
        out_of_core = rank is not None and a.nbytes > _memory() // 2
    if out_of_core and rank is None:
        raise UserError("--out-of-core wants --rank: a tolerance needs A in memory")
    shape, dtype = a.shape, a.dtype.newbyteorder("=").name
    target = f"rank {rank}" if rank is not None else f"error {rtol}"
    with new_file(output) as beside, progress(as_json) as bar:
        bar.add_task(f"{target} of {shape[0]} x {shape[1]}", total=None, note="")
        if out_of_core:
            assert rank is not None
            result = linalg.svd_out_of_core(
                matrix,
                rank,
                sweeps=2 if sweeps is None else sweeps,
                oversample=oversample,
                center=center,
                seed=seed,
                progress=False,
            )
        else:
            result = linalg.randomized_svd(
                _tensor(a),
                rank,
                sweeps=sweeps,
                oversample=oversample,
                rtol=rtol,
                center=center,
                seed=seed,
            )
        del a
        U, S, Vh = result
        facts = {
            "rank": int(S.shape[0]),
            "sweeps": int(result.info.sweeps),
            "error": float(result.info.error),
            "converged": bool(result.info.converged),
            "seed": seed,
        }
        save_file(
            {"U": U.contiguous(), "S": S.contiguous(), "Vh": Vh.contiguous()},
            beside,
            # one entry: safetensors writes several in no fixed order
            metadata={"structmat": json.dumps(facts)},
        )
    seconds = time.perf_counter() - started
    if as_json:
        source = {"input": str(matrix), "shape": list(shape), "dtype": dtype}
        print_json({**source, **facts, "seconds": seconds, "output": str(output)})
        return
    console = Console()
    console.print(
        f"A is {shape[0]:,} x {shape[1]:,} {dtype}. "
        f"Rank {facts['rank']}: relative error {facts['error']:.3g}, {facts['sweeps']} passes, "
        f"{seconds:.1f} s.",
        highlight=False,
    )
    if not facts["converged"]:
        reason = (
            "allow more passes with --sweeps"
            if sweeps is not None
            else f"the tolerance is below the precision of {str(S.dtype).removeprefix('torch.')}"
        )
        console.print(f"Not converged: {reason}.", highlight=False)
    console.print(f"U, S, Vh written to {output}", highlight=False, markup=False, soft_wrap=True)


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.floating]]":
    """A memory map of the matrix."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        a = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a .npy file of numbers: {error}") from None
    if not isinstance(a, np.ndarray):
        raise UserError(f"{path} holds several arrays; wanted one matrix in a .npy file")
    if a.ndim != 2 or 0 in a.shape:
        raise UserError(f"{path} holds an array of shape {a.shape}; wanted a matrix (m, n)")
    if a.dtype.newbyteorder("=").name not in _FLOATS:
        wanted = ", ".join(_FLOATS)
        raise UserError(f"{path} holds {a.dtype}; wanted one of {wanted}")
    return a


def _tensor(a: "np.ndarray[tuple[int, int], np.dtype[np.floating]]") -> torch.Tensor:
    # torch takes neither foreign byte order nor negative strides, and warns of read-only memory
    return torch.from_numpy(np.array(a, dtype=a.dtype.newbyteorder("="), order="C"))
