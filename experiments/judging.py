"""What is said of an epoch on the target: by validators without its labels, and by its labels."""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.study import Fitted
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.domains import Domains, has_labels, unlabelled
from medtl_jax.data.streams import select
from medtl_jax.domain.selection import ORACLE, VALIDATORS, Evidence, Validator, measure
from medtl_jax.domain.validators import distributions, sampled_rows
from medtl_jax.metrics.scores import task_scores
from medtl_jax.models.backbone import FEATURES
from medtl_jax.objectives.task import Task
from medtl_jax.report.predict import predict_scores
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.inference import Predict, make_predict

# Target images that an epoch is judged by without their labels; of masks every pixel is one row.
_JUDGED = {"segment": 200}
_MOST_JUDGED = 2000

# `fn(predict, source, target)`, see `make_judge`.
Judge = Callable[[Predict, dict, dict], dict[str, float | None]]


def make_judge(
    config: dict, fitted: Fitted, chosen: Validator, domains: Domains, mesh: DataMesh
) -> Judge:
    """`fn(predict, source, target)`: what validators, and the target's labels, say of an epoch.

    The values of every validator that needs no more than the predictions, and of the `chosen` one.
    What takes labels has a name that begins with `oracle`: nothing is chosen by it. `source` and
    `target` are the network's variables for the images of each domain.
    """
    task = fitted.task
    train = domains.target.splits["train"]
    rows = sampled_rows(len(train), _JUDGED.get(task.name, _MOST_JUDGED), config["seed"])
    images = select(unlabelled(train).images, rows)
    labels = train.target[rows] if has_labels(train) else None
    known = [found for found in VALIDATORS.values() if found.needs == ("target_probabilities",)]
    validators = [] if task.name == "regress" else known
    reads_features = "target_features" in chosen.needs
    size = config["eval"]["batch_size"]
    features = make_predict(fitted.network, fitted.spec, mesh, size, output=FEATURES)

    def judge(predict, source, target):
        score, evidence = predict_scores(predict, target, images, task), Evidence()
        if validators:
            evidence = Evidence(target_probabilities=distributions(task.name, score))
        if reads_features:
            evidence = dataclasses.replace(
                evidence,
                target_features=features(target, images),
                **_of_source(domains.source, predict, features, source, task, len(rows)),
            )
        asked = [*validators, chosen] if reads_features else validators
        values = measure(evidence, asked)
        return values | ({} if labels is None else _oracle(task, labels, score))

    return judge


def _of_source(
    source: Dataset, predict: Predict, features: Predict, variables: dict, task: Task, most: int
) -> dict[str, np.ndarray]:
    """The fields of `Evidence` that are of the source, of at most so many training images."""
    train, val = source.splits["train"], source.splits["val"]
    score = predict_scores(predict, variables, val.images, task)
    right = score[np.arange(len(val)), np.asarray(val.target[:])]
    images = select(train.images, sampled_rows(len(train), most, 0))
    return {
        "source_train_features": features(variables, images),
        "source_features": features(variables, val.images),
        "source_losses": -np.log(np.maximum(right, 1e-12)),
    }


def _oracle(task: Task, labels: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    scores = task_scores(task.name, labels, score, task.classes, surfaces=False)
    values = {name: scores[name].value for name in task.selection if name != "loss"}
    return {
        f"{ORACLE}_{name}": None if np.isnan(value) else float(value)
        for name, value in values.items()
    }
