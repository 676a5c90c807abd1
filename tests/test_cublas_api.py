# SPDX-License-Identifier: Apache-2.0
"""Our declarations of cuBLASLt agree with NVIDIA's header, where there is one."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++")


def include_folders() -> list[Path]:
    spec = find_spec("nvidia")
    wheels = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    found = [header.parent for folder in wheels for header in folder.glob("*/include/*.h")]
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found += [Path(folder) / "include" for folder in toolkits if folder]
    return sorted({folder for folder in found if folder.is_dir()})


def compiles(source: str) -> subprocess.CompletedProcess[str]:
    flags = [f"-I{folder}" for folder in [ROOT / "csrc/core", ROOT / "csrc/include"]]
    flags += [f"-isystem{folder}" for folder in include_folders()]
    command = [str(COMPILER), "-std=c++20", "-fsyntax-only", *flags, "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_declarations_agree() -> None:
    if compiles("#include <cublasLt.h>").returncode != 0:
        pytest.skip("no CUDA header cublasLt.h")
    done = compiles((ROOT / "tests/cpp/cublas_api_check.cpp").read_text())
    assert done.returncode == 0, done.stderr
