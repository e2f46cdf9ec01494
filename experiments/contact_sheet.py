"""The contact sheet of a study of many runs, which leave no figures themselves."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.augmentation import augmentation_lines, draw_sheet
from experiments.cells import Cell
from experiments.ladder_requests import Memos, cell_request, named
from experiments.prepared import read_training_data
from experiments.study import Request


def study_sheet(cells: Sequence[Cell], request: Request, memos: Memos) -> dict[str, Figure]:
    """`{"augmentation": figure}` of the first of the runs that augments its images; else nothing.

    Its caption says which run that is and what it does: another one may do something else.

    Args:
      cells: the runs of the study, in their order.
      request: of the study.
      memos: where the data that are read are kept.
    """
    lines = {cell.name: augmentation_lines(cell.resolved) for cell in cells}
    first = next((cell for cell in cells if lines[cell.name]), None)
    if first is None:
        return {}
    own = cell_request(first, request, memos)
    with named(first):
        train = read_training_data(own).splits["train"]
    figure = draw_sheet(first.resolved, train)
    words = " ".join(lines[first.name])
    figure.set_label(f"{figure.get_label()} As in the run {first.title}. {words}")
    return {"augmentation": figure}
