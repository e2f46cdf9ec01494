"""Reads images with a frozen network: a linear probe or k-NN on its features, and a report."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from experiments import auditing, finetune, reporting, study
from experiments.features import linear_probe, probed_features, with_head
from experiments.options import check_options_without_data, group_table
from experiments.prepared import make_mesh, make_network, read_training_data
from experiments.settings import unused_by_probe
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.data.catalog import Array, Dataset
from medtl_jax.metrics.calibration import FITTED_ON
from medtl_jax.metrics.scores import task_scores
from medtl_jax.models.backbone import HEAD
from medtl_jax.objectives.task import make_task
from medtl_jax.report.predict import predict_scores, predict_splits
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import write_history
from medtl_jax.transfer.features import make_extract
from medtl_jax.transfer.neighbours import fit_neighbours
from medtl_jax.weights.pretrained import save_weights

resolve = finetune.resolve

# Where there is no neighbour's vote to wait for, a score is what the network's head says.
Score = Callable[[Array], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What has been learned of the features.

    Attributes:
      fitted: the network; with the probe as its head, if that is what was fitted.
      score: of images.
      record: what metrics.jsonl has of it: one line, as of one epoch.
      note: what was chosen, for the report.
    """

    fitted: Fitted
    score: Score
    record: dict
    note: str


def run(request: Request) -> None:
    """Fits a probe or k-NN to the features of the training images and reports on the test split."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    if runs.is_finished(folder):
        reporting.say_finished(request)
        return
    check_options_without_data(config)
    for line in unused_by_probe(config):
        console.note(f"note: {line}")
    mesh = make_mesh(config)
    weights = study.open_weights(config, console)
    dataset = read_training_data(request)
    train = dataset.splits["train"]
    task = make_task(dataset.spec, train.target, config["train"]["ordinal"])
    table = {part: "high" for part in group_table(config)}
    channels = train.images.shape[-1]
    fitted, card = make_network(request, task, table, weights, None, None, channels)
    found = _extract(request, fitted, dataset, mesh)
    environment = study.describe(request, dataset, task, card)
    environment["audit"] = auditing.audit_card(config, console, dataset)
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        if found.fitted.has_head:
            _save(request, found)
        write_history(folder / "metrics.jsonl", [found.record])
        predictions = predict_splits(found.score, dataset, ("val", "test"))
        calibration = reporting.calibrate(config, task, predictions)
        reporting.finish(
            request,
            environment,
            found.fitted,
            predictions,
            calibration,
            [{**found.record, "best": True}],
            [found.note],
            FITTED_ON,
            train=dataset.splits["train"],
        )


def _extract(request: Request, fitted: Fitted, dataset: Dataset, mesh: DataMesh) -> Extraction:
    """What is learned of the training features, with what it took."""
    learn = _probe if request.config["probe"]["kind"] == "linear" else _neighbours
    fitted, score, note, chosen = learn(request, fitted, dataset, mesh)
    effort = request.effort
    request.console.note(note)
    val = dataset.splits["val"]
    target, scores = np.asarray(val.target[:]), score(val.images)
    task = fitted.task
    values = task_scores(task.name, target, scores, task.classes, surfaces=False)
    record = {
        "epoch": 1,
        "step": 0,
        "val_loss": chosen.pop("val_loss"),
        **{
            f"val_{name}": None if np.isnan(values[name].value) else values[name].value
            for name in task.selection
            if name != "loss"
        },
        **chosen,
        "seconds": round(effort.seconds, 3),
        "cpu_seconds": round(effort.cpu_seconds, 3),
        "images_per_second": round(len(dataset.splits["train"]) / effort.seconds, 1),
    }
    return Extraction(fitted, score, record, note)


def _probe(
    request: Request, fitted: Fitted, dataset: Dataset, mesh: DataMesh
) -> tuple[Fitted, Score, str, dict]:
    """The network with a linear probe as its head."""
    probe = linear_probe(request, fitted, dataset, mesh)
    fitted = with_head(fitted, probe)
    predict = make_predict(fitted.network, fitted.spec, mesh, request.config["eval"]["batch_size"])
    score = functools.partial(predict_scores, predict, fitted.variables, task=fitted.task)
    lowest = min(loss for _, loss, _ in probe.path)
    note = f"Linear probe, penalty {probe.penalty:.3g} chosen by validation loss."
    return fitted, score, note, {"val_loss": lowest, "penalty": probe.penalty}


def _neighbours(
    request: Request, fitted: Fitted, dataset: Dataset, mesh: DataMesh
) -> tuple[Fitted, Score, str, dict]:
    """The votes of the nearest training images."""
    (train, target), (val, val_target) = probed_features(request, fitted, dataset, mesh)
    with request.effort.measured():
        found = fit_neighbours(fitted.task, train, target, val, val_target)
    size = request.config["eval"]["batch_size"]
    extract = make_extract(fitted.network, fitted.spec, mesh, size, HEAD)

    def score(images):
        blocks = extract(fitted.variables, images, lambda done, total: None)
        return found.score(np.concatenate(list(blocks)))

    fitted = dataclasses.replace(fitted, has_head=False)
    note = f"{found.k} nearest neighbours, chosen by validation loss."
    return fitted, score, note, {"val_loss": dict(found.path)[found.k], "neighbours": found.k}


def _save(request: Request, found: Extraction) -> None:
    """Writes the network with its probe as a trained one, for other runs and programs."""
    fitted = found.fitted
    save_weights(request.folder / runs.WEIGHTS, fitted.variables, fitted.spec, fitted.task)
    with Checkpoints(request.folder / "checkpoints") as checkpoints:
        if checkpoints.last_epoch() is None:
            checkpoints.save(1, fitted.variables, [found.record], fitted.variables)
