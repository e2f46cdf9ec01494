"""What a training changed of the pretrained network, and what it forgot of the source."""

import functools

from experiments import study
from experiments.prepared import Prepared
from experiments.study import Request
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.models.backbone import SOURCE_LOGITS
from medtl_jax.report.predict import predict_scores
from medtl_jax.training.inference import make_predict
from medtl_jax.transfer.drift import measure

# What is kept of the source is told by one number.
_METRIC = {
    "classify": "accuracy",
    "ordinal": "quadratic_kappa",
    "multilabel": "auc",
    "regress": "mae",
}


def measure_drift(request: Request, prepared: Prepared, before: dict, after: dict) -> dict:
    """The content of `drift.json`, see `drift.measure`; `source` is added where there is one.

    `source` has the classifier's score on the source's test split before and after:
    `{"metric", "before": entry, "after": entry}`, None where no source is named.

    Args:
      before, after: variables before training and of the chosen epoch.
    """
    config, parts = request.config, prepared.parts
    drawn = () if config["model"]["keep_head"] else study.new_parts(config)
    pretrained = {
        kind: {part: tree for part, tree in parts_of.items() if part not in drawn}
        for kind, parts_of in before.items()
    }
    card = measure(
        prepared.network,
        parts.spec,
        pretrained,
        after,
        prepared.dataset.splits["val"].images,
        prepared.table,
        prepared.training.mesh,
        config["eval"]["batch_size"],
    )
    kept = prepared.source and _source_kept(request, prepared, before, after)
    return {**card, "source": kept or None}


def _source_kept(request: Request, prepared: Prepared, before: dict, after: dict) -> dict:
    """What the classifier of the weights still knows of the set that it was made on."""
    options, task = request.config["eval"], prepared.classifier
    test = prepared.source.splits["test"]
    predict = make_predict(
        prepared.network,
        prepared.parts.spec,
        prepared.training.mesh,
        options["batch_size"],
        output=SOURCE_LOGITS,
    )
    score = functools.partial(predict_scores, predict, images=test.images, task=task)
    metric = _METRIC[task.name]
    before_entry, after_entry = (
        score_with_intervals(
            task.name,
            test.target,
            score(variables=variables),
            task.classes,
            test.patients,
            resamples=options["resamples"],
            seed=request.config["seed"],
        )[metric]
        for variables in (before, after)
    )
    values = [
        "undefined" if entry["value"] is None else f"{entry['value']:.4f}"
        for entry in (before_entry, after_entry)
    ]
    request.console.note(f"source: {metric} {values[0]} before, {values[1]} after")
    return {"metric": metric, "before": before_entry, "after": after_entry}
