"""What a row of an ablation predicts for a seed: that of its run, or the mean of its members.

Nothing is fitted: the mean is fixed before any prediction is seen.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from experiments import trained
from experiments.ablation_cells import AblationCell
from experiments.compare import read_run
from experiments.ensemble_candidates import validation_value
from experiments.ladder_requests import remade
from experiments.ladder_results import recorded_validation
from medtl_jax.ensemble.fusion import Fusion
from medtl_jax.metrics.pairing import Predicted, align

_RULE = "mean"


def read_entry(entry: Sequence[AblationCell], folder: pathlib.Path, split: str) -> Predicted:
    """What the runs of one seed of a row predict together, from their folders.

    Of several it is the mean of their probabilities or, of a regression, of their numbers.

    Args:
      entry: of `entries_of`, finished.
      folder: of the ablation.
      split: `val` or `test`.

    Raises:
      UserError: a run is damaged, or has other images than the others.
    """
    found = [_read(cell, folder, split) for cell in entry]
    if len(found) == 1:
        return found[0]
    members = align(found)
    first, scores = members[0], [member.score for member in members]
    fusion = Fusion(_RULE, first.task, (len(scores), scores[0].shape[-1]))
    return dataclasses.replace(first, score=fusion.apply(scores))


def _read(cell: AblationCell, folder: pathlib.Path, split: str) -> Predicted:
    path = cell.folder(folder)
    with remade(path):
        return read_run(path, cell.title, split).predicted


def validation_values(
    entries: Sequence[Sequence[AblationCell]], folder: pathlib.Path, select: str
) -> list[float | None]:
    """The validation value `select` of each entry, None where it is undefined.

    It is what the runs recorded. Where any entry is fused, which nobody recorded, that of every
    entry is worked out from what it predicts: one table has one kind of value.
    """
    fused = any(len(entry) > 1 for entry in entries)
    found = []
    for entry in entries:
        first = entry[0].folder(folder)
        # The scale of a regression is that of the drawn training images.
        task = trained.read_card(first).task
        if fused:
            value = validation_value(task, select, read_entry(entry, folder, "val"))
        else:
            value = recorded_validation(first, select, task)
        found.append(value)
    return found
