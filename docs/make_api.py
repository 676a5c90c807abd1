# SPDX-License-Identifier: Apache-2.0
"""Writes the API reference of the installed structmat, from its docstrings, to docs/_site."""

import shutil
from pathlib import Path

import pdoc

# First: pdoc imports with subprocesses forbidden, and an editable structmat rebuilds on import.
import structmat  # noqa: F401

DOCS = Path(__file__).parent
MODULES = ("structmat", "!structmat.cli", "!structmat.demo.plots", "!structmat.__main__")


def main() -> None:
    site = DOCS / "_site"
    shutil.rmtree(site, ignore_errors=True)
    pdoc.render.configure(
        docformat="google", math=False, search=True, show_source=True, footer_text="structmat"
    )
    pdoc.pdoc(*MODULES, output_directory=site)
    pages = sum(1 for _ in site.rglob("*.html"))
    print(f"{pages} pages, begin at {site / 'structmat.html'}")


if __name__ == "__main__":
    main()
