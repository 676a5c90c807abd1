# SPDX-License-Identifier: Apache-2.0
"""The layers of the project: who includes whom, what the binaries need, one stem per operator."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
HEADERS = sorted((CSRC / "include").rglob("*.h"))
COMPILER = shutil.which("c++")
SOURCES = {".cpp", ".h", ".cu", ".py", ".cmake", ".sh"}

ops = find_spec("structmat._ops")
assert ops is not None
assert ops.origin is not None
PACKAGE = Path(ops.origin).parent
BINARIES = [*sorted(PACKAGE.glob("*.so")), PACKAGE / "lib" / "libstructmat.so"]


def included(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


def tracked() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def dynamic_section(binary: Path) -> str:
    return subprocess.run(
        ["readelf", "-d", binary], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("folder", ["core", "include"])
def test_core_knows_neither_torch_nor_python(folder: str) -> None:
    forbidden = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$|^(torch|python)/")
    for path in (CSRC / folder).rglob("*"):
        if path.is_file():
            found = {name for name in included(path) if forbidden.search(name)}
            assert not found, f"{path.relative_to(ROOT)} includes {found}"


def test_public_headers_include_only_themselves_and_the_standard_library() -> None:
    for header in HEADERS:
        for name in included(header):
            inside = name.startswith("structmat/") and (CSRC / "include" / name).exists()
            standard = "/" not in name and "." not in name
            assert inside or standard, f"{header.name} includes {name}"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_public_header_compiles_alone_as_cpp17(header: Path) -> None:
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fsyntax-only",
        "-x",
        "c++",
    ]
    name = header.relative_to(CSRC / "include")
    subprocess.run(
        [COMPILER, *flags, f"-I{CSRC / 'include'}", "-"],
        input=f"#include <{name}>\n",
        text=True,
        check=True,
    )


def test_umbrella_header_includes_every_public_header() -> None:
    found = included(CSRC / "include/structmat/structmat.h")
    missing = {f"structmat/{header.name}" for header in HEADERS} - found
    # Reached through others: export.h is only the macro.
    assert missing <= {"structmat/structmat.h", "structmat/export.h"}


def test_no_folder_of_the_builder_in_the_binaries() -> None:
    for binary in BINARIES:
        content = binary.read_bytes()
        for folder in {ROOT, ROOT.resolve()}:
            assert f"{folder}/".encode() not in content, f"{binary.name} holds {folder}"


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
def test_operators_use_no_python_symbol() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", PACKAGE / "_ops.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "torch" in symbols
    assert not re.findall(r"\bU (_?Py[A-Z_]\w*)", symbols)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no binutils")
def test_libraries_need_no_more_than_they_should() -> None:
    core = re.findall(r"NEEDED.*\[(\S+?)\.so", dynamic_section(PACKAGE / "lib/libstructmat.so"))
    allowed = {"libscipy_openblas", "libgomp", "libstdc++", "libm", "libgcc_s", "libc"}
    allowed |= {"libdl", "libpthread", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert set(core) <= allowed
    python = next(PACKAGE.glob("_C.*.so"))
    assert "torch" not in dynamic_section(python)
    for binary in BINARIES:
        paths = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", dynamic_section(binary))
        for path in filter(None, ":".join(paths).split(":")):
            assert path.startswith("$ORIGIN"), f"{binary.name} looks for libraries in {path}"


def test_bindings_for_numpy_import_no_torch() -> None:
    path = next(PACKAGE.glob("_C.*.so"))
    program = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("structmat._C", {str(path)!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
assert module.version and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_stem_in_every_layer() -> None:
    stems = {path.stem for path in (CSRC / "torch").glob("*.cpp")} - {"library"}
    for stem in stems:
        wanted = [
            f"csrc/include/structmat/{stem}.h",
            f"csrc/core/{stem}/{stem}.cpp",
            f"tests/test_{stem}.py",
            f"bench/bench_{stem}.py",
        ]
        missing = [name for name in wanted if not (ROOT / name).exists()]
        assert not missing, f"{stem}: no {missing}"
    for kernel in CSRC.rglob("*_cuda.cu"):
        stub = kernel.with_name(f"{kernel.stem}_stub.cpp")
        assert stub.exists(), f"{kernel.relative_to(ROOT)} has no stub for builds without nvcc"


def test_every_source_is_in_the_build() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in CSRC.rglob("*"):
        if path.suffix in {".cpp", ".cu"}:
            name = str(path.relative_to(ROOT))
            assert name in listed, f"CMakeLists.txt does not build {name}"


def test_every_source_names_its_license() -> None:
    for path in tracked():
        if path.suffix in SOURCES or path.name == "CMakeLists.txt":
            first = "\n".join(path.read_text().split("\n")[:2])
            assert "SPDX-License-Identifier: Apache-2.0" in first, path.relative_to(ROOT)
