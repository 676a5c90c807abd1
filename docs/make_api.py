# SPDX-License-Identifier: Apache-2.0
"""Writes docs/api.md from the docstrings of all that is public; with --check, only compares."""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import structmat

PAGE = Path(__file__).parent / "api.md"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")


def markdown(docstring: str) -> str:
    """A docstring's sections as Markdown: entries become lists, examples code blocks."""
    out: list[str] = []
    section = ""
    for line in docstring.replace("``", "`").splitlines():
        if match := re.fullmatch(rf"({'|'.join(SECTIONS)}):", line):
            section = match[1]
            out += ["", f"**{section}**", ""]
        elif section and line and not line.startswith(" "):
            section = ""
            out += ["", line]
        elif section.startswith("Example"):
            out.append(line.removeprefix("    "))
        elif section and re.match(r"    [\w`*., ()]+:( |$)", line):
            name, _, rest = line.strip().partition(":")
            out.append(f"- **{name.strip('`')}**:{rest}")
        elif section and line:
            out.append("  " + line.strip() if out[-1].startswith(("- ", "  ")) else line.strip())
        else:
            out.append(line)
    text = "\n".join(out)
    # A run of >>> lines and what they print, up to the next empty line, is a code block.
    return re.sub(r"(?m)^ *>>> (?:.*\n?)+?(?=\n|\Z)", code_block, text)


def code_block(match: re.Match[str]) -> str:
    lines = match[0].rstrip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(["```pycon", *(line[indent:] for line in lines), "```"]) + "\n"


def signature(name: str, value: object) -> str:
    """The call as it is written; annotations and quotes around them would drown it."""
    try:
        found = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return name
    plain = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in found.parameters.values()
        if p.name != "self"
    ]
    bare = found.replace(parameters=plain, return_annotation=inspect.Signature.empty)
    return f"{name}{bare}"


def entry(name: str, value: object, level: int) -> Iterator[str]:
    yield f"{'#' * level} {name.split('.')[-1]}"
    if callable(value):
        yield f"`{signature(name, value)}`"
    yield markdown(inspect.getdoc(value) or "")
    if isinstance(value, type) and not issubclass(value, BaseException):
        for key, member in vars(value).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            described = not key.startswith("_") and inspect.getdoc(function)
            if described and (inspect.isfunction(function) or isinstance(function, property)):
                yield from entry(f"{name}.{key}", function, level + 1)


def module(value: ModuleType, name: str) -> Iterator[str]:
    members = [(key, getattr(value, key)) for key in value.__all__ if not key.startswith("__")]
    yield f"## {name}"
    yield markdown(inspect.getdoc(value) or "")
    for key, member in members:
        if callable(member):
            yield from entry(f"{name}.{key}", member, 3)
    for key, member in members:
        if isinstance(member, ModuleType):
            yield from module(member, f"{name}.{key}")


def main() -> None:
    parts = ["# API reference", "Written from the docstrings by `make docs`; `sm` is `structmat`."]
    text = "\n\n".join([*parts, *module(structmat, "sm")])
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("docs/api.md is not what the docstrings say: run `make docs`")
        return
    PAGE.write_text(text)
    print(f"{PAGE.name}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()
