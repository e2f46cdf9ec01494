"""The frame of the command-line tools: a mistake is one line, a closed pipe no traceback."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from medtl_jax.errors import UserError

_CLOSED_PIPE = 141  # as shells report a program that SIGPIPE has ended


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are `UserError`s of one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def printable(text: str) -> str:
    """`text` with control characters, line ends and half characters escaped.

    Names and texts in a file come from outside; an escape sequence could rewrite the screen.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def report_mistake(error: UserError | OSError) -> int:
    """The exit code after a mistake, 2; `error` becomes one line on stderr.

    An `OSError` is a disk that is full or a folder that may not be read, met anywhere on the way.
    """
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    print(f"error: {kind}{printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


def run_tool(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """The exit code of `main(arguments)`: 0, 2 after a mistake, 130 after Ctrl-C.

    A `UserError`, or an error of the system's, becomes one line on stderr.
    """
    try:
        main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (UserError, OSError) as error:
        return report_mistake(error)
    except KeyboardInterrupt:
        return 130
    return 0
