"""The folder of many runs: where they lie, for commands that want one and are given all."""

import pathlib

from medtl_jax import runs
from medtl_jax.errors import UserError

FOLDER = "cells"
# What a folder is, by its experiment.
_MANY = {"ladder": "a ladder", "adapt": "a table of adaptations", "ablation": "an ablation"}


def check_no_ladder(folder: pathlib.Path, config: dict) -> None:
    """UserError that names a finished run inside where `folder`, with its `config`, has many.

    Args:
      folder: a run folder.
      config: the content of its `config.json`.
    """
    kind = config.get("experiment")
    if not isinstance(kind, str) or kind not in _MANY:
        return
    cells = folder / FOLDER
    found = sorted(path.name for path in cells.glob("*") if runs.is_finished(path))
    if not found:
        raise UserError(
            f"{folder} is {_MANY[kind]}, and none of its runs is finished: run it first"
        )
    # A run of k-NN has no network, which most commands need.
    name = next((name for name in found if not name.startswith("knn-")), found[0])
    raise UserError(f"{folder} is {_MANY[kind]}: name one of its runs, such as {cells / name}")
