# SPDX-License-Identifier: Apache-2.0
"""The command line: ``structmat demo | compress | svd | info``.

One module a command, each a thin layer over the public API. Tables go to the standard output,
progress and errors to standard error; ``--json`` prints one JSON object and nothing else.
"""

import signal
import sys
from typing import Annotated

import typer

import structmat
from structmat.cli.compress import compress
from structmat.cli.demo import demo
from structmat.cli.info import info
from structmat.cli.svd import svd

app = typer.Typer(
    name="structmat",
    help="Make the linear layers of transformers cheaper by giving their weights structure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (demo, compress, svd, info):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(structmat.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``structmat`` program."""
    # Batch systems end a job with SIGTERM, a terminal that closes with SIGHUP: clean up then as
    # after Ctrl-C. What the caller had ignored, as nohup does, stays ignored.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        sys.stderr.write("structmat: interrupted\n")
        sys.exit(130)
