"""Features of some images of both domains, of networks of a table of adaptations."""

import pathlib
from collections.abc import Sequence

import numpy as np

from experiments import adaptation, trained
from experiments.adapt_cells import AdaptCell
from experiments.ladder_requests import Memos, cell_request, named
from experiments.prepared import make_mesh, read_training_data
from experiments.study import Request
from medtl_jax.data.catalog import Split
from medtl_jax.data.domains import Domains, has_labels
from medtl_jax.data.streams import select
from medtl_jax.domain.validators import sampled_rows
from medtl_jax.models.backbone import FEATURES
from medtl_jax.objectives.task import Task
from medtl_jax.report.adaptation_figures import MOST_POINTS, Features
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import make_predict

# Tasks in which an image is of one class, which marks it in a plot.
_OF_ONE_CLASS = ("classify", "ordinal")


def features_of(
    cells: Sequence[AdaptCell], request: Request, memos: Memos
) -> tuple[dict[str, Features], tuple[str, ...]]:
    """`({method: Features}, classes)` of the finished runs `cells`, each of another method.

    The images are some of the source's validation split and some of those that the target has for
    training. An image of a task without one class an image has no mark, and there are no classes.

    Args:
      cells: of one seed, which is that of the table.
      request: of the table.
      memos: where the data that are read are kept.
    """
    own = cell_request(cells[0], request, memos)
    with named(cells[0]):
        read = read_training_data(own)
        domains = adaptation.find_domains(own.config, read, own.console, own.memo)
    mesh, panels = make_mesh(own.config), {}
    for cell in cells:
        panels[cell.strategy] = _features(cell.folder(request.folder), cell, domains, mesh)
    spec = domains.source.spec
    return panels, spec.classes if spec.task in _OF_ONE_CLASS else ()


def _features(folder: pathlib.Path, cell: AdaptCell, domains: Domains, mesh: DataMesh) -> Features:
    """Those of one run, each domain with the batch statistics that it has there."""
    found, labels = [], []
    splits = (domains.source.splits["val"], domains.target.splits["train"])
    for split, of_source in zip(splits, (True, False), strict=True):
        fitted = trained.open_run(folder, of_source=of_source).fitted
        rows = sampled_rows(len(split), MOST_POINTS, cell.config["seed"])
        size = cell.resolved["eval"]["batch_size"]
        predict = make_predict(fitted.network, fitted.spec, mesh, size, output=FEATURES)
        found.append(predict(fitted.variables, select(split.images, rows)))
        labels.append(_labels(split, rows, fitted.task))
    return Features(*found, *labels)


def _labels(split: Split, rows: np.ndarray, task: Task) -> np.ndarray | None:
    """The places of the images' classes, int `[n]`, where they have one and it is known."""
    if task.name not in _OF_ONE_CLASS or not has_labels(split):
        return None
    return np.asarray(split.target[rows])
