"""Classifies by hand-made descriptors, as before CNNs: HOG, LBP or raw pixels, and a classifier.

    python launch.py --config=configs/traditional.py --config.traditional.classifier=svm

Hyper-parameters are chosen on the validation split alone. Neither a network nor the fitted model is
kept: a file of trees would be one that executes what it holds.
"""

from collections.abc import Set

import numpy as np

from experiments import auditing, finetune, reporting, study
from experiments.options import check_options_without_data, check_traditional_task
from experiments.prepared import read_training_data
from experiments.settings import unused_by_probe
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.data.catalog import Array, Dataset
from medtl_jax.errors import UserError
from medtl_jax.metrics.calibration import FITTED_ON
from medtl_jax.metrics.scores import task_scores
from medtl_jax.objectives.task import Task, make_task
from medtl_jax.report.predict import predict_splits
from medtl_jax.traditional.classifiers import Classifier, fit_classifier
from medtl_jax.traditional.descriptors import described, kept_descriptors
from medtl_jax.training.loop import write_history
from medtl_jax.transfer.feature_cache import default_cache_folder

_FEATURES = {"hog": "HOG", "lbp": "LBP", "pixels": "raw pixels"}
_CLASSIFIERS = {
    "logistic": "Logistic regression",
    "svm": "SVM (RBF kernel)",
    "forest": "Random forest",
}


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it takes effect: there is no network, and there are no weights.

    UserError for weights that were `given`.
    """
    weights = config["model"]["weights"]
    if "model.weights" in given and weights != "none":
        raise UserError(
            f"model.weights={weights!r} has no effect: experiment=traditional has no network; "
            "leave it out"
        )
    return finetune.resolve({**config, "model": {**config["model"], "weights": "none"}}, given)


def run(request: Request) -> None:
    """Fits a classifier to the descriptors of the training images, and reports on the test."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    if runs.is_finished(folder):
        reporting.say_finished(request)
        return
    check_options_without_data(config)
    for line in unused_by_probe(config):
        console.note(f"note: {line}")
    dataset = read_training_data(request)
    train = dataset.splits["train"]
    task = make_task(dataset.spec, train.target, config["train"]["ordinal"])
    check_traditional_task(task.name)
    read = study.input_spec(config, train.images.shape[-1], None)
    environment = study.describe(
        request, dataset, task, study.weights_card(None, "none", read, None)
    )
    environment["audit"] = auditing.audit_card(config, console, dataset)
    classifier = _fit(request, dataset, task)
    record, note = _record(request, dataset, task, classifier), _note(config, classifier)
    console.note(note)
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        write_history(folder / "metrics.jsonl", [record])
        predictions = predict_splits(_scored(request, classifier), dataset, ("val", "test"))
        calibration = reporting.calibrate(config, task, predictions)
        reporting.finish(
            request,
            environment,
            Fitted(None, None, {}, task, has_head=False),
            predictions,
            calibration,
            [{**record, "best": True}],
            [note, "No network was trained, and the classifier itself is not kept."],
            FITTED_ON,
        )


def _fit(request: Request, dataset: Dataset, task: Task) -> Classifier:
    """The classifier of the training images' descriptors, chosen on validation."""
    config, name = request.config, request.config["traditional"]["features"]
    folder = default_cache_folder(config["transfer"]["cache_dir"])
    vectors = {}
    for split in ("train", "val"):
        with request.console.progress("features") as advance:
            vectors[split] = kept_descriptors(
                folder,
                name,
                dataset.splits[split],
                request.console.note,
                advance,
                request.effort.add,
            )
    with request.console.progress("classifier") as advance, request.effort.measured():
        return fit_classifier(
            config["traditional"]["classifier"],
            task,
            vectors["train"],
            np.asarray(dataset.splits["train"].target[:]),
            vectors["val"],
            np.asarray(dataset.splits["val"].target[:]),
            seed=config["seed"],
            advance=advance,
        )


def _scored(request: Request, classifier: Classifier):
    """`fn(images)`: their scores; vectors are worked out block by block."""
    name = request.config["traditional"]["features"]

    def score(images: Array) -> np.ndarray:
        with request.console.progress("features") as advance:
            blocks = described(name, images, advance)
            return np.concatenate([classifier.score(block) for block in blocks])

    return score


def _record(request: Request, dataset: Dataset, task: Task, classifier: Classifier) -> dict:
    """What metrics.jsonl has of it: one line, as of one epoch."""
    val, effort = dataset.splits["val"], request.effort
    scores = _scored(request, classifier)(val.images)
    values = task_scores(task.name, np.asarray(val.target[:]), scores, task.classes)
    return {
        "epoch": 1,
        "step": 0,
        "val_loss": classifier.loss,
        **{
            f"val_{name}": None if np.isnan(values[name].value) else values[name].value
            for name in task.selection
            if name != "loss"
        },
        **classifier.chosen,
        "seconds": round(effort.seconds, 3),
        "cpu_seconds": round(effort.cpu_seconds, 3),
        "images_per_second": round(len(dataset.splits["train"]) / effort.seconds, 1),
    }


def _note(config: dict, classifier: Classifier) -> str:
    """What was chosen, for the report."""
    settings = config["traditional"]
    chosen = ", ".join(f"{name}={value:.3g}" for name, value in classifier.chosen.items())
    unfinished = ""
    if classifier.unfinished:
        unfinished = (
            f" {classifier.unfinished} of {len(classifier.path)} candidates had not converged."
        )
    return (
        f"{_CLASSIFIERS[settings['classifier']]} on {_FEATURES[settings['features']]}: {chosen}, "
        f"chosen by validation loss.{unfinished}"
    )
