# SPDX-License-Identifier: Apache-2.0
"""What a user did wrong ends in one line on standard error and a non-zero status."""

import errno
import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn, TypeVar

import torch
import typer

Command = TypeVar("Command", bound=Callable[..., Any])
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """Something only the user can put right; the message says what."""


def require(*packages: str) -> None:
    """Raises:
    UserError: a package is not installed; names the command that installs it.
    """
    missing = [name.replace("_", "-") for name in packages if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"needs {names}, not installed here: pip install {' '.join(missing)}")


def reports_errors(command: Command) -> Command:
    """Wraps a command so that its errors are one line. ``STRUCTMAT_TRACEBACK=1`` shows where."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            _fail("interrupted", _INTERRUPTED)
        except BrokenPipeError:  # the reader of our output went away: `structmat info | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(1) from None
        except Exception as error:
            if os.environ.get("STRUCTMAT_TRACEBACK", "0") != "0":
                raise
            _fail(f"{command.__name__}: {_message(error)}")

    return run  # type: ignore[return-value]


def _fail(message: str, status: int = 1) -> NoReturn:
    # plain text: rich would wrap the line and read brackets in paths as markup
    typer.echo(f"structmat: {message}", err=True)
    raise typer.Exit(status)


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"out of memory{': ' + text if text else ''}"
    if isinstance(error, OSError) and error.filename is not None:
        if error.errno == errno.ENOSPC:
            return f"no space left on the disk of {error.filename}"
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, (UserError, ValueError, TypeError, OSError, RuntimeError)):
        name = ""  # said by structmat, torch or transformers to their user
    else:
        name = f"{type(error).__name__}: "
    return name + (text or type(error).__name__)
