# SPDX-License-Identifier: Apache-2.0
"""Text that is on every machine: docstrings of the installed Python packages."""

import ast
import inspect
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SKIPPED_FOLDERS = frozenset({"tests", "test", "testing", "_vendor", "__pycache__", "idlelib"})
_FILE_BYTES = 200_000
_PAIRS_PER_FILE = 6  # generated API docs repeat themselves within a file
_WORDS_OF_QUERY = range(4, 41)
_CHARS_OF_DOCUMENT = range(120, 4001)


def docstring_pairs(seed: int = 0, limit: int | None = 4000) -> list[tuple[str, str]]:
    """Pairs ``(query, document)``: a docstring's first paragraph and the rest of it.

    Source files of the standard library and of every installed package are visited in an order that
    depends on ``seed`` and their relative paths alone, parsed (never imported), and read until
    ``limit`` pairs are found. Queries and documents are unique. Nothing is cached or written.

    Args:
        seed: order of the files, hence which pairs come first. The same installed packages and seed
            give the same list.
        limit: pairs wanted; ``None`` reads all there are. Fewer come back where there are fewer.

    Returns:
        The pairs, mixed over packages: any prefix is a fair sample, so a split is a slice.

    Raises:
        ValueError: ``limit`` is not positive.

    Cost: about 1.5 ms a pair on one core, all of it parsing.

    >>> pairs = docstring_pairs(seed=0, limit=20)
    >>> len(pairs), all(query and document for query, document in pairs)
    (20, True)
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"docstring_pairs: limit must be positive, got {limit}")
    generator = random.Random(seed)
    files = sorted(_source_files())
    generator.shuffle(files)
    pairs: list[tuple[str, str]] = []
    queries: set[str] = set()
    documents: set[str] = set()
    for _, path in files:
        found = 0
        for query, document in _pairs_of_file(path):
            if query.lower() in queries or document[:200] in documents:
                continue
            queries.add(query.lower())
            documents.add(document[:200])
            pairs.append((query, document))
            found += 1
            if found == _PAIRS_PER_FILE:
                break
        if limit is not None and len(pairs) >= limit + limit // 4:
            break
    generator.shuffle(pairs)  # pairs of one file lie together until here
    return pairs if limit is None else pairs[:limit]


def _source_files() -> Iterator[tuple[str, Path]]:
    """``(path relative to its root, path)`` of every source file worth reading, each root once."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    seen: set[str] = set()
    for root in dict.fromkeys(root.resolve() for root in roots if root.is_dir()):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            folders = set(relative.parts[:-1])
            if folders & _SKIPPED_FOLDERS or folders & {"site-packages", "dist-packages"}:
                continue
            # structmat's own text would change the data with every edit of it
            if relative.parts[0] == "structmat" or relative.as_posix() in seen:
                continue
            seen.add(relative.as_posix())
            yield relative.as_posix(), path


def _pairs_of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        if path.stat().st_size > _FILE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    nodes: list[ast.stmt | ast.Module] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, _DOCUMENTED):
            nodes.extend(reversed(node.body))
            docstring = ast.get_docstring(node, clean=False)
            if docstring and (pair := _split(docstring)):
                yield pair


def _split(docstring: str) -> tuple[str, str] | None:
    query, _, document = inspect.cleandoc(docstring).partition("\n\n")
    query = " ".join(query.split())
    document = " ".join(document.split())
    if len(query.split()) not in _WORDS_OF_QUERY or len(document) not in _CHARS_OF_DOCUMENT:
        return None
    if "copyright" in (query + document[:300]).lower() or "license" in query.lower():
        return None
    return query, document
