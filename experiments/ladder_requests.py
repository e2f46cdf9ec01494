"""How a run among many is asked for: quietly, its warnings kept in its folder."""

import contextlib
import pathlib
from collections.abc import Iterator

from experiments.cells import Cell
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.console import Advance, Console
from medtl_jax.errors import UserError
from medtl_jax.files import is_text

NOTES = "notes.json"
# What was read of each set of images so far, by `Cell.place`.
Memos = dict[str, dict]
_MARK = "note: "


class Quiet(Console):
    """The console of one run among many: its progress under its name, its warnings in its folder.

    Warnings are the notes that begin with `note:`. They are written as soon as the folder is
    there: a run that was interrupted does not say all of them again.
    """

    def __init__(self, outer: Console, cell: Cell, folder: pathlib.Path) -> None:
        self._outer, self._name, self._folder = outer, cell.title, folder
        self._known = set(cell.of_others)
        self._new: list[str] = []

    def note(self, text: str) -> None:
        """Keeps a warning, and says nothing."""
        words = " ".join(text.removeprefix(_MARK).split())
        if text.startswith(_MARK) and words not in self._known:
            self._known.add(words)
            self._new.append(words)
        if self._new and self._folder.is_dir():
            earlier = read_notes(self._folder)
            new = [words for words in self._new if words not in earlier]
            runs.write_json(self._folder / NOTES, {"notes": [*earlier, *new]})
            self._new = []

    def progress(self, title: str) -> contextlib.AbstractContextManager[Advance]:
        """As `Console.progress`."""
        return self._outer.progress(f"{self._name}: {title}")


def read_notes(folder: pathlib.Path) -> list[str]:
    """The warnings of the run in `folder`, a line each. UserError where their file is damaged."""
    path = folder / NOTES
    if not path.is_file():
        return []
    notes = runs.read_json(path).get("notes")
    if not isinstance(notes, list) or not all(map(is_text, notes)):
        raise UserError(f"{path} is damaged; delete {folder} to have the run made again")
    return notes


def cell_request(cell: Cell, request: Request, memos: Memos) -> Request:
    """The request of one run of the study `request`."""
    folder = cell.folder(request.folder)
    quiet = Quiet(request.console, cell, folder)
    memo = memos.setdefault(cell.place, {})
    return Request(cell.resolved, folder, cell.command, quiet, brief=True, memo=memo)


def keep_one(memos: Memos, cell: Cell) -> None:
    """Forgets what was read of other places than the cell's, which may be as large as its own."""
    for place in set(memos) - {cell.place}:
        del memos[place]


@contextlib.contextmanager
def named(cell: Cell, name: str = "") -> Iterator[None]:
    """A mistake inside says which run it is of, and names settings of the study.

    `name` is that of several runs of which `cell` is one.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{name or cell.title}: {cell.words(str(error))}") from error


@contextlib.contextmanager
def remade(folder: pathlib.Path) -> Iterator[None]:
    """A fault found inside, of the finished run in `folder`, is told with what a study can do.

    What else the message says to do is for a run alone: a study asks for no other folder, and a
    finished run is not trained again without its checkpoints.
    """
    try:
        yield
    except UserError as error:
        fault = str(error).partition("; ")[0]
        raise UserError(f"{fault}; delete {folder} to have the run made again") from error
