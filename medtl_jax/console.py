"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

Advance = Callable[[int, int, str], None]

_SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Notes and progress on standard output; nothing at all where it is `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._rich = rich.console.Console(highlight=False, markup=False, emoji=False, quiet=quiet)

    def note(self, text: str) -> None:
        """Prints a text, above the bar if there is one; control characters as `?`."""
        # File and class names come from outside; an escape sequence could rewrite the screen.
        self._rich.print(
            re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", text), soft_wrap=True
        )

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Advance]:
        """A function `advance(done, total, text)` to be called as the work proceeds."""
        if self._rich.quiet or not self._rich.is_terminal:
            yield self._lines(title)
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
        )
        with rich.progress.Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task(title, total=None, text="")
            yield lambda done, total, text="": bar.update(
                task, completed=done, total=total, text=text
            )

    def _lines(self, title: str) -> Advance:
        started = said = time.monotonic()

        def advance(done: int, total: int, text: str = "") -> None:
            nonlocal said
            now = time.monotonic()
            # Short work needs no line; long work says every few seconds that it is alive.
            if now - said >= _SECONDS_BETWEEN_LINES and done < total:
                said = now
                self.note(f"{title}: {done}/{total} after {now - started:.0f} s {text}".rstrip())

        return advance
