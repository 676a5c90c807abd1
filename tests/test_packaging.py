# SPDX-License-Identifier: Apache-2.0
"""The wheel's contents, and C++ programs against the wheel and against `cmake --install`.

Both are built here, without CUDA: that is quick, and shows that a machine without nvcc can build.
Where STRUCTMAT_TEST_WHEELS names the folder of a wheel that is built already, and
STRUCTMAT_TEST_PREFIX that of an installed library, these are tested instead.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import structmat as sm

ROOT = Path(__file__).parents[1]
TOOLS = ("scikit_build_core", "pybind11", "scipy_openblas32", "cmake")
pytestmark = [
    pytest.mark.skipif(
        any(find_spec(tool) is None for tool in TOOLS) or shutil.which("c++") is None,
        reason="no build tools",
    ),
    pytest.mark.xdist_group("packaging"),  # the builds are made once
]


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def cmake(*arguments: object) -> str:
    return run(sys.executable, "-m", "cmake", *arguments)


def ninja() -> list[str]:
    found = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={found}"] if found else []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("STRUCTMAT_TEST_WHEELS"):
        found = [*Path(built).glob("structmat-*.whl")]
        assert len(found) == 1, f"{built} holds {len(found)} wheels of structmat"
        return found[0]
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    settings = ["build-dir=build/test-wheel", "cmake.define.STRUCTMAT_CUDA=OFF"]
    settings += ["cmake.define.STRUCTMAT_WERROR=ON"]
    run(*command, *[f"--config-settings={s}" for s in settings], "-w", folder, ".", cwd=ROOT)
    return next(folder.glob("structmat-*.whl"))


@pytest.fixture(scope="module", params=["wheel", "cmake --install"])
def prefix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed C++ library: include, lib, lib/cmake."""
    folder = tmp_path_factory.mktemp("prefix")
    if request.param == "wheel":
        with zipfile.ZipFile(request.getfixturevalue("wheel")) as archive:
            archive.extractall(folder)
        return folder / "structmat"
    if built := os.environ.get("STRUCTMAT_TEST_PREFIX"):
        assert (Path(built) / "lib/libstructmat.so").is_file(), f"{built} has no libstructmat.so"
        return Path(built)
    build = ROOT / "build" / "test-cmake"
    cmake("-S", ROOT, "-B", build, *ninja(), "-DSTRUCTMAT_CUDA=OFF", "-DSTRUCTMAT_WERROR=ON",
          f"-DPython_EXECUTABLE={sys.executable}")  # fmt: skip
    cmake("--build", build)
    cmake("--install", build, "--prefix", folder)
    return folder


@pytest.fixture(scope="module")
def program(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("example")
    cmake("-S", ROOT / "examples/cpp", "-B", build, *ninja(), f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", build)
    return build / "low_rank_layer"


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = archive.read("structmat/lib/LICENSE.scipy-openblas32.txt").decode()
    for part in (
        "The OpenBLAS Project",
        "University of Tennessee",
        "GCC RUNTIME LIBRARY EXCEPTION",
    ):
        assert part in licence
    sources = (ROOT / "python").rglob("*.py")
    wanted = {str(path.relative_to(ROOT / "python")) for path in sources}
    headers = (ROOT / "csrc/include").rglob("*.h")
    wanted |= {f"structmat/include/{path.relative_to(ROOT / 'csrc/include')}" for path in headers}
    wanted |= {"structmat/py.typed", "structmat/_ops.so", "structmat/lib/libstructmat.so"}
    wanted |= {"structmat/lib/libscipy_openblas.so"}
    wanted |= {"structmat/lib/cmake/structmat/structmatConfig.cmake"}
    assert wanted <= names, f"missing: {wanted - names}"
    assert any(name.startswith("structmat/_C.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "structmat",
        "structmat_config",
    }
    assert not {name for name in names if "emulated" in name or name.endswith((".cu", ".cpp"))}


def layer(dtype: torch.dtype, bias: bool) -> dict[str, torch.Tensor]:
    tensors = {"block.0.U": torch.randn(37, 5), "block.0.V": torch.randn(5, 19)}
    if bias:
        tensors["block.0.bias"] = torch.randn(37)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_program_agrees_with_python(
    program: Path, tmp_path: Path, dtype: torch.dtype, bias: bool
) -> None:
    weights = layer(dtype, bias)
    x = torch.randn(2, 3, 19).to(dtype)
    save_file(weights, tmp_path / "layer.safetensors", metadata={"format": 'a "b"\n\\c'})
    save_file({"x": x}, tmp_path / "in.safetensors")
    arguments = ["layer.safetensors", "block.0", "in.safetensors", "out.safetensors"]
    run(program, *arguments, cwd=tmp_path)
    y = load_file(tmp_path / "out.safetensors")["y"]
    U, V, b = (weights.get(f"block.0.{name}") for name in ("U", "V", "bias"))
    want = sm.ops.low_rank_linear(x, U, V, b)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 37)
    torch.testing.assert_close(y, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_svd_to_a_tolerance(prefix: Path, tmp_path: Path) -> None:
    """A C++17 program that meets the library by its header alone."""
    source, out = ROOT / "tests/cpp/svd_to_tolerance.cpp", tmp_path / "svd"
    library = prefix / "lib"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{prefix / 'include'}"]
    run(*command, source, f"-L{library}", "-lstructmat", f"-Wl,-rpath,{library}", "-o", out)
    assert run(out).startswith("rank 3 error")


def test_program_runs_on_its_pattern(program: Path, tmp_path: Path) -> None:
    weights = layer(torch.float32, True)
    save_file(weights, tmp_path / "layer.safetensors")
    out = run(program, "layer.safetensors", "block.0", cwd=tmp_path)
    x = (torch.arange(4 * 19) % 17 - 8).reshape(4, 19) / 8
    want = sm.ops.low_rank_linear(x, *weights.values())
    found = [float(line.split("=")[1]) for line in out.splitlines() if line.startswith("y[")]
    assert found == pytest.approx(want[0, :4].tolist(), abs=2e-5 * float(want.abs().max()))


def test_program_runs_a_compressed_model(program: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 48))
    sm.compress(model, keep=0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "small")
    x = torch.randn(5, 64)
    save_file({"x": x}, tmp_path / "in.safetensors")
    run(
        program,
        "small/structmat.safetensors",
        "1",
        "in.safetensors",
        "out.safetensors",
        cwd=tmp_path,
    )
    y = load_file(tmp_path / "out.safetensors")["y"]
    want = model[1](x).detach()
    torch.testing.assert_close(y, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def broken_files(good: bytes) -> dict[str, bytes]:
    length = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + length], good[8 + length :]

    def rebuilt(new: bytes) -> bytes:
        return len(new).to_bytes(8, "little") + new + data

    return {
        "empty": b"",
        "truncated": good[:-1],
        "long": good + b"\0",
        "huge header": (2**63).to_bytes(8, "little") + good[8:],
        "no json": rebuilt(b"x" * length),
        "twice": rebuilt(header.replace(b"block.0.V", b"block.0.U")),
        "unknown dtype": rebuilt(header.replace(b'"F32"', b'"F99"', 1)),
        "wrong shape": rebuilt(header.replace(b"[37,5]", b"[37,6]")),
        "huge shape": rebuilt(header.replace(b"[37,5]", b"[9223372036854775807,5]")),
        "negative": rebuilt(header.replace(b"[37,5]", b"[-37,-5]")),
        "outside": rebuilt(header.replace(b'"data_offsets":[0,', b'"data_offsets":[-1,')),
        "after the object": rebuilt(header.rstrip() + b"}"),
    }


def test_program_refuses_broken_files(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_file(layer(torch.float32, True), path)
    for name, content in broken_files(path.read_bytes()).items():
        path.write_bytes(content)
        done = subprocess.run(
            [program, path, "block.0"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, f"{name}: {done}"
        assert str(path) in done.stderr, f"{name}: {done.stderr}"


def test_program_refuses_wrong_use(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_file(layer(torch.float32, True), path)
    save_file({"x": torch.zeros(3, 20)}, tmp_path / "in.safetensors")
    for arguments, status, message in [
        ([path, "block.1"], 1, "block.1.U"),
        ([path, "block.0", tmp_path / "in.safetensors"], 1, "low_rank_linear"),
        ([path, "block.0", tmp_path / "none.safetensors"], 1, "cannot open"),
        ([path], 2, "usage"),
    ]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert message in done.stderr


def test_prefix_is_told_without_torch() -> None:
    told = run(sys.executable, "-m", "structmat_config", "--cmake-prefix").strip()
    assert told == sm.cmake_prefix_path
    assert (Path(told) / "structmat" / "structmatConfig.cmake").is_file()
    code = "import sys, structmat_config as c; c.cmake_prefix(); assert 'torch' not in sys.modules"
    run(sys.executable, "-c", code)
