# SPDX-License-Identifier: Apache-2.0
"""``structmat svd``: the truncated SVD of a matrix in a file."""

import json
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
    rank: Annotated[int, typer.Option("--rank", "-r", help="Singular values to keep.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new .safetensors file.")],
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
    a = _read(matrix)
    if not 1 <= rank <= min(a.shape):
        raise UserError(
            f"--rank must lie between 1 and {min(a.shape)}, the smaller side of A, got {rank}"
        )
    with new_file(output) as beside, progress(as_json) as bar:
        bar.add_task(f"rank {rank} of {a.shape[0]} x {a.shape[1]}", total=None, note="")
        result = linalg.randomized_svd(a, rank, sweeps=sweeps, oversample=oversample, seed=seed)
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
        source = {"input": str(matrix), "shape": list(a.shape), "dtype": str(a.dtype)[6:]}
        print_json({**source, **facts, "seconds": seconds, "output": str(output)})
        return
    console = Console()
    console.print(
        f"A is {a.shape[0]:,} x {a.shape[1]:,} {str(a.dtype)[6:]}. "
        f"Rank {facts['rank']}: relative error {facts['error']:.3g}, {facts['sweeps']} passes, "
        f"{seconds:.1f} s.",
        highlight=False,
    )
    if not facts["converged"]:
        console.print("Not converged: allow more passes with --sweeps.", highlight=False)
    console.print(f"U, S, Vh written to {output}", highlight=False, markup=False, soft_wrap=True)


def _read(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        a = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a .npy file of numbers: {error}") from None
    if not isinstance(a, np.ndarray):
        raise UserError(f"{path} holds several arrays; wanted one matrix in a .npy file")
    if a.ndim != 2 or 0 in a.shape:
        raise UserError(f"{path} holds an array of shape {a.shape}; wanted a matrix (m, n)")
    if a.dtype.newbyteorder("=").name not in _FLOATS:
        wanted = ", ".join(_FLOATS)
        raise UserError(f"{path} holds {a.dtype}; wanted one of {wanted}")
    # torch takes neither foreign byte order nor negative strides
    return torch.from_numpy(np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("=")))
