"""Ranks networks and weights for a data set before any training.

    python launch.py --config=configs/finetune.py --config.experiment=rank \\
        --config.rank.models=efficientnet_lite0=imagenet,resnet18=imagenet,resnet18=none

Each is run once, frozen, over the training images, and its features are scored: LogME, the H-score
and, where the weights bring a classifier of their own, LEEP (see `metrics.transferability`). Writes
`ranking.json` and `figures/ranking.png`. The scores say which to train first; they predict no
accuracy. Images of val are left out of train and not used, those of test are not read.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Set

import numpy as np

from experiments import study
from experiments.features import kept_activations
from experiments.source import classifier_task
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.errors import UserError
from medtl_jax.metrics.transferability import h_score, leep, logme
from medtl_jax.models.backbone import HEAD, SOURCE_HEAD
from medtl_jax.models.registry import list_models
from medtl_jax.objectives.task import Task, make_task
from medtl_jax.report.ranking import (
    SCORES,
    by_first_score,
    label_of_record,
    ranking_figure,
    ranking_table,
)
from medtl_jax.report.style import save_figures
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.weights.pretrained import Pretrained
from medtl_jax.weights.sources import find_weights

TABLE, FIGURE = "ranking.json", "ranking"
MEANING = (
    "The scores rank the networks on these training images; they predict no accuracy. Train the "
    "first few and compare them on validation."
)
# What a candidate says for itself, or what the features do not depend on.
_OWN = {
    **{"dont_load": "", "keep_head": False},
    **{"auxiliary": 0.0, "dropout": 0.0, "drop_path": 0.0},
}
# What `environment.json` says of each candidate.
_CARD = ("model", "weights", "sha256", "loaded")
# Tasks whose scores are the probabilities of one class each.
_WITH_PROBABILITIES = ("classify", "ordinal")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network and its weights, as `model.name` and `model.weights` name them."""

    model: str
    weights: str

    def config(self, config: dict) -> dict:
        """`config` for this network."""
        own = {"name": self.model, "weights": self.weights, **_OWN}
        return {**config, "model": {**config["model"], **own}}


def parse_candidates(text: str, key: str = "rank.models") -> tuple[Candidate, ...]:
    """The candidates of the setting `key`: `name=weights`, comma-separated.

    >>> parse_candidates("lenet5=https://a.org/b.pth#sha256=00")
    (Candidate(model='lenet5', weights='https://a.org/b.pth#sha256=00'),)

    Raises:
      UserError: something else, no such network, or one pair twice.
    """
    found: list[Candidate] = []
    for part in text.split(","):
        name, equals, weights = (piece.strip() for piece in part.partition("="))
        if not (name and equals and weights):
            raise UserError(
                f"{key}: {part.strip()!r} is not name=weights; separate them by commas, as "
                "in resnet18=imagenet,resnet18=none"
            )
        if name not in list_models():
            raise UserError(f"{key}: {name!r} is not a model; known: {', '.join(list_models())}")
        candidate = Candidate(name, weights)
        if candidate in found:
            raise UserError(f"{key} names {name}={weights} twice; leave one out")
        found.append(candidate)
    return tuple(found)


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it is. UserError for what could have no effect, and for masks."""
    parse_candidates(config["rank"]["models"])
    for key in ("name", "weights", *_OWN):
        if f"model.{key}" in given:
            raise UserError(
                f"model.{key}={config['model'][key]!r} has no effect with experiment=rank, which "
                "takes the networks and weights of rank.models as they are; leave it out"
            )
    _check_task(config["task"])
    return config


def run(request: Request) -> None:
    """Scores the candidates of `request`; UserError before anything is written."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    candidates = parse_candidates(config["rank"]["models"])
    for candidate in candidates:
        _check(request, candidate)
    # Without val, train would have the images that a training takes for it.
    first = candidates[0].config(config)
    channels = config["model"]["in_chans"] or None
    dataset = study.read_data(first, console, channels, request.memo, splits=("train", "val"))
    _check_task(dataset.spec.task)
    task = make_task(dataset.spec, dataset.splits["train"].target, config["train"]["ordinal"])
    records = [_score(request, candidate, dataset, task, mesh) for candidate in candidates]
    runs.open_folder(folder, config, _environment(request, dataset, task, records))
    ranked = by_first_score(records)
    with runs.hold(folder):
        save_figures({FIGURE: ranking_figure(ranked)}, folder / "figures")
        content = {
            "meaning": MEANING,
            "split": "train",
            "images": len(dataset.splits["train"]),
            "ranking": ranked,
        }
        runs.write_json(folder / TABLE, content)
    console.note(ranking_table(ranked))
    for record in ranked:
        for name, entry in record["scores"].items():
            if entry["value"] is None:
                console.note(
                    f"note: {label_of_record(record)}: no {SCORES[name]}, {entry['reason']}"
                )
    console.note(f"{MEANING}\nranking: {folder / TABLE}, {folder / 'figures' / FIGURE}.png")


def _check_task(task: str) -> None:
    if task == "segment":
        raise UserError(
            "experiment=rank scores one label, finding list or number for an image, not masks: "
            "use it with another task"
        )


def _check(request: Request, candidate: Candidate) -> None:
    """UserError for what need not wait for the data: the image's size, weights that are missing."""
    with _named(candidate):
        study.check_image_size(candidate.config(request.config))
        if candidate.weights != "none":
            with request.console.progress("weights") as advance:
                find_weights(candidate.model, candidate.weights, advance)


@contextlib.contextmanager
def _named(candidate: Candidate) -> Iterator[None]:
    """Says in a UserError whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"rank.models {candidate.model}={candidate.weights}: {error}") from error


def _score(
    request: Request, candidate: Candidate, dataset: Dataset, task: Task, mesh: DataMesh
) -> dict:
    """What `ranking.json` holds of the candidate."""
    started, train = time.perf_counter(), dataset.splits["train"]
    own = dataclasses.replace(request, config=candidate.config(request.config))
    request.console.note(f"scoring {candidate.model}={candidate.weights}")
    with _named(candidate):
        weights = study.open_weights(own.config, own.console)
        classifier, missing = _classifier(weights)
        read = study.input_spec(own.config, train.images.shape[-1], weights)
        network, spec = study.make_model(own.config, task, read, classifier)
        variables, report = study.initial_variables(network, own.config, weights, task)
    fitted = Fitted(network, spec, variables, task)
    features = kept_activations(own, fitted, train, HEAD, mesh)
    extracted = time.perf_counter()
    labels = "it is for classes and findings, not for numbers" if task.name == "regress" else ""
    scores = {
        "logme": _entry(lambda: logme(features, train.target)),
        "h_score": _entry(lambda: h_score(features, train.target), labels),
        "leep": _entry(lambda: _leep(fitted, features, classifier, train), labels or missing),
    }
    ended = time.perf_counter()
    return {
        "model": candidate.model,
        "weights": candidate.weights,
        "sha256": report.sha256 if report else "",
        "loaded": str(report or "no pretrained weights"),
        "width": features.shape[1],
        "scores": scores,
        "seconds": ended - started,
        "seconds_of_scores": ended - extracted,
    }


def _classifier(weights: Pretrained | None) -> tuple[Task | None, str]:
    """The task of the weights' own classifier, or None and why LEEP cannot use it."""
    if weights is None:
        return None, "weights=none bring no classifier"
    task = classifier_task(weights)
    if task is None:
        return None, "the weights bring no classifier"
    if task.name not in _WITH_PROBABILITIES:
        return None, f"the weights' own head is for {task.name}, without a probability of classes"
    return task, ""


def _leep(fitted: Fitted, features: np.ndarray, classifier: Task, train: Split) -> float:
    """LEEP of the probabilities that the weights' own classifier gives its classes."""
    head = fitted.variables["params"][SOURCE_HEAD]
    logits = np.asarray(features) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    return leep(classifier.score(logits), train.target)


def _entry(score: Callable[[], float], missing: str = "") -> dict:
    """A score, or none and why: `missing`, or that nothing is to be told apart."""
    value = math.nan if missing else score()
    if math.isnan(value):
        return {"value": None, "reason": missing or "all training images have the same target"}
    return {"value": value}


def _environment(request: Request, dataset: Dataset, task: Task, records: list[dict]) -> dict:
    """The content of `environment.json`, the weights of all candidates in the place of one's."""
    digests = "".join(record["sha256"] or "none" for record in records)
    weights = {
        "name": request.config["rank"]["models"],
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "candidates": [{key: record[key] for key in _CARD} for record in records],
    }
    return study.describe(request, dataset, task, weights)
