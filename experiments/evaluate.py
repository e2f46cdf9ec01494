"""Scores the best checkpoint of a run on labelled images, its own or others.

    python launch.py --config=configs/finetune.py --config.experiment=evaluate \\
        --config.eval.run=RUN --config.data.name=folder --config.data.dir=DIR

`config.data` names the images and `config.eval.splits` the splits; the model, and what it was
made with, come from the run folder. So does what divides the run's own data into train, val and
test: an image that it was trained on is never scored as one of another split.

A run that was adapted to a target may have batch statistics of both domains. Its own data, the
source, meet those of the source, all other images those of the target.
"""

import functools
from collections.abc import Set

from experiments import adaptation, reporting, study, trained
from experiments.domain_settings import has_own_statistics
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.catalog import SPLITS
from medtl_jax.errors import UserError
from medtl_jax.metrics.calibration import FITTED_ON
from medtl_jax.report.predict import predict_scores, predict_splits
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.views import check_views


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config with what belongs to the run taken from there.

    That is the model, see `trained.take_model`, and what the splits of its own data are made by,
    see `trained.take_splits`.
    """
    config = trained.take_model(config, given)
    return trained.take_splits(config, given, _splits(config))


def run(request: Request) -> None:
    """Writes predictions, metrics and the report of `config.eval.splits`."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    splits = _splits(config)
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    of_source = trained.is_of_source(config)
    model = trained.open_run(trained.run_folder(config), of_source=of_source)
    calibration = trained.read_calibration(trained.run_folder(config), model.fitted.task)
    task = model.fitted.task
    dataset = study.read_data(
        config, console, model.channels, task=task.name, classes=task.classes, splits=splits
    )
    channels = next(iter(dataset.splits.values())).images.shape[-1]
    check_views(config["augment"], config["eval"]["tta"], task.name == "segment", channels)
    environment = study.describe(request, dataset, task, model.weights)
    environment["checkpoint_sha256"] = model.sha256
    fitted = model.fitted
    predict = make_predict(fitted.network, fitted.spec, mesh, config["eval"]["batch_size"])
    score = functools.partial(predict_scores, predict, fitted.variables, task=task)
    predictions = predict_splits(score, dataset, splits)
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        notes = [f"Checkpoint of epoch {model.epoch} of {config['eval']['run']}."]
        notes += _statistics(config, of_source)
        # Another set's `val` is as good as any other split for what the run fitted on its own.
        fitted_on = FITTED_ON if of_source else ""
        if not trained.is_own_data(config):
            notes.append(
                "Not the run's own data: that none of these images was trained on is not checked."
            )
            console.note(f"note: {notes[-1]}")
        reporting.finish(
            request, environment, fitted, predictions, calibration, [], notes, fitted_on
        )


def _statistics(config: dict, of_source: bool) -> list[str]:
    """Which batch statistics the images met, where the run has those of two domains."""
    if of_source and has_own_statistics(config):
        return ["Batch statistics: those of the source, as these images are of its set."]
    return adaptation.reading_of_evaluation(config)


def _splits(config: dict) -> tuple[str, ...]:
    """The splits that `config.eval.splits` names."""
    splits = tuple(part.strip() for part in config["eval"]["splits"].split(","))
    if not set(splits) <= set(SPLITS) or len(set(splits)) < len(splits):
        raise UserError(f"eval.splits={config['eval']['splits']!r}: name some of train,val,test")
    return splits
