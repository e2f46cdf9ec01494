"""The folder of many runs: where they lie, for commands that want one and are given all."""

import pathlib
from collections.abc import Mapping

from medtl_jax import runs
from medtl_jax.errors import UserError

FOLDER = "cells"
# What a folder is, by its experiment.
_MANY = {
    "ladder": "a ladder",
    "adapt": "a table of adaptations",
    "ablation": "an ablation",
    "paper_tables": "a paper's tables",
}
# It predicts like a run, by more than one network.
_FUSED = {"ensemble": "an ensemble"}


def check_no_ladder(folder: pathlib.Path, config: dict) -> None:
    """UserError that names a finished run inside where `folder`, with its `config`, has many.

    Args:
      folder: a run folder.
      config: the content of its `config.json`.
    """
    _check_none_of(_MANY, folder, config)


def check_one_network(folder: pathlib.Path, config: dict) -> None:
    """As `check_no_ladder`, for who wants the network of a run: an ensemble has several."""
    _check_none_of(_MANY | _FUSED, folder, config)


def _check_none_of(many: Mapping[str, str], folder: pathlib.Path, config: dict) -> None:
    kind = config.get("experiment")
    if not isinstance(kind, str) or kind not in many:
        return
    cells = folder / FOLDER
    found = sorted(path.name for path in cells.glob("*") if runs.is_finished(path))
    if not found:
        raise UserError(f"{folder} is {many[kind]}, and none of its runs is finished: run it first")
    # A run of k-NN or of a traditional classifier has no network, which most commands need.
    with_network = (name for name in found if (cells / name / runs.WEIGHTS).is_file())
    name = next(with_network, found[0])
    raise UserError(f"{folder} is {many[kind]}: name one of its runs, such as {cells / name}")
