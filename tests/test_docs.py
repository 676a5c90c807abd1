# SPDX-License-Identifier: Apache-2.0
"""Documentation: examples in docstrings and pages run, links lead somewhere, public names have both
a description and an example."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import structmat as sm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [ROOT / "csrc" / "DESIGN.md", ROOT / "bench" / "README.md"]
PAGES = [page for page in [*PAGES, *sorted((ROOT / "docs").glob("**/*.md"))] if page.exists()]
MODULES = [
    info.name
    for info in pkgutil.walk_packages(sm.__path__, "structmat.")
    if not info.name.endswith("__main__") and not info.name.split(".")[-1].startswith("_")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", ["structmat", *MODULES])
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=FLAGS, report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} fail"


def public(module: ModuleType = sm, prefix: str = "sm") -> Iterator[tuple[str, object]]:
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield from public(value, f"{prefix}.{name}")
        elif callable(value):
            yield f"{prefix}.{name}", value


@pytest.mark.parametrize(
    ("name", "value"), list(public()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_public_names_are_described(name: str, value: object) -> None:
    text = inspect.getdoc(value) or ""
    assert len(text) > 40, f"{name} has no docstring"
    is_error = isinstance(value, type) and issubclass(value, Exception)
    assert is_error or ">>>" in text, f"{name} has no example"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    """All Python blocks of a page, one after another, as a reader would run them."""
    code = "\n".join(blocks(page, "python"))
    if code:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in known, f"{page.name} links to {target}"
