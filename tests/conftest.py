# SPDX-License-Identifier: Apache-2.0
"""Back ends, data types and seeds shared by all tests.

`--backend NAME` (repeatable) keeps only the tests of that back end. STRUCTMAT_REQUIRE_EMULATED=1
and STRUCTMAT_REQUIRE_CUDA=1 make a missing emulator or GPU a failure instead of a skip.
"""

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Read when torch loads OpenMP. Threads that spin while they wait take the cores from other workers
# (pytest -n): gradcheck then takes 6 s instead of 0.8 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

import structmat  # noqa: F401  (loads the operators)

BACKENDS = ("cpu", "cuda-emulated", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Where a test runs. `device` is what tensors are made on: cpu for the emulated kernels too."""

    name: str
    device: str

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=BACKENDS, help="run only this back end")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--backend")
    if not wanted:
        return

    def is_wanted(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        return callspec is not None and callspec.params.get("backend") in wanted

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]


def _missing(variable: str, reason: str) -> None:
    if os.environ.get(variable) == "1":
        pytest.fail(f"{reason}, and {variable}=1")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def emulated_library() -> str | None:
    """Loads the emulated operators; None where the build has none."""
    spec = find_spec("structmat._ops_emulated")
    if spec is None or spec.origin is None:
        return None
    torch.ops.load_library(spec.origin)
    return spec.origin


def _emulated_operators() -> dict[str, torch._ops.OpOverload]:
    """Emulated operators with a CPU kernel, that is all that take tensors, by name."""
    found = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        if namespace != "structmat_emulated":
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"):
            packet, _, overload = name.partition(".")
            operator = getattr(torch.ops.structmat_emulated, packet)
            found[name] = getattr(operator, overload or "default")
    return found


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, emulated_library: str | None) -> Iterator[Backend]:
    """Each back end in turn.

    For cuda-emulated the CPU kernels of torch.ops.structmat are those of structmat_emulated while
    the test runs, so that checks, fakes and autograd are the real ones.
    """
    name = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            _missing("STRUCTMAT_REQUIRE_CUDA", "torch sees no GPU")
        if not torch.ops.structmat.has_cuda():
            _missing("STRUCTMAT_REQUIRE_CUDA", "structmat was built without CUDA")
        yield Backend(name, "cuda")
        return
    if name == "cpu":
        yield Backend(name, "cpu")
        return
    if emulated_library is None:
        _missing("STRUCTMAT_REQUIRE_EMULATED", "structmat was built without STRUCTMAT_EMULATE")
    override = torch.library.Library("structmat", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for operator, kernel in _emulated_operators().items():
                override.impl(operator, kernel, "CPU", allow_override=True)
        yield Backend(name, "cpu")
    finally:
        override._destroy()


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def threads() -> Iterator[int]:
    """Restores torch's thread count after a test that changes it; gives the count before."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def run_on_the_core(tmp_path: Path) -> Callable[[str], None]:
    """Compiles a C++ program against the core's headers and runs it; its assertions decide."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def run(source: str) -> None:
        program, csrc = tmp_path / "program", Path(__file__).parents[1] / "csrc"
        folders = [f"-I{csrc / folder}" for folder in ("include", "core")]
        options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", *folders, "-x", "c++", "-"]
        subprocess.run(
            [compiler, *options, "-o", str(program)], input=source, text=True, check=True
        )
        subprocess.run([str(program)], check=True)

    return run
