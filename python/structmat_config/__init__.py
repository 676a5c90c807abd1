# SPDX-License-Identifier: Apache-2.0
"""Where structmat's C++ library lies, told without importing structmat, and so without torch."""

import argparse
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def cmake_prefix() -> str:
    """The folder for CMAKE_PREFIX_PATH, under which `find_package(structmat)` finds the library."""
    package = find_spec("structmat")
    folders = None if package is None else package.submodule_search_locations
    # The finders themselves: importlib's find_spec would import structmat to look inside it. An
    # editable install keeps sources and binaries apart, so that the package's own path will not do.
    for finder in sys.meta_path if folders else ():
        spec = finder.find_spec("structmat._ops", folders)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / "lib" / "cmake")
    raise SystemExit("structmat-config: structmat is not installed in this environment")


def main() -> None:
    parser = argparse.ArgumentParser(prog="structmat-config", description=__doc__)
    parser.add_argument("--version", action="version", version=version("structmat"))
    parser.add_argument(
        "--cmake-prefix", action="store_true", required=True, help="folder for CMAKE_PREFIX_PATH"
    )
    parser.parse_args()
    print(cmake_prefix())
