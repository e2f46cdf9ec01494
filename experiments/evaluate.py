"""Scores the best checkpoint of a run on labelled images, its own or others.

    python launch.py --config=configs/finetune.py --config.experiment=evaluate \\
        --config.eval.run=RUN --config.data.name=folder --config.data.dir=DIR

`config.data` names the images and `config.eval.splits` the splits; the model, and what it was
made with, come from the run folder. So does what divides the run's own data into train and val:
an image that it was trained on is never scored as one of val.
"""

from collections.abc import Set

from experiments import reporting, study, trained
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.catalog import SPLITS
from medtl_jax.errors import UserError
from medtl_jax.report.predict import predict_splits
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config with what belongs to the run taken from there.

    That is the model, see `trained.take_model`, and where `train` or `val` is evaluated what they
    are made by, see `trained.take_splits`.
    """
    config = trained.take_model(config, given)
    if {"train", "val"} & set(_splits(config)):
        config = trained.take_splits(config, given)
    return config


def run(request: Request) -> None:
    """Writes predictions, metrics and the report of `config.eval.splits`."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    splits = _splits(config)
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    model = trained.open_run(trained.run_folder(config))
    dataset = study.read_data(config, console, model.channels, classes=model.classes, splits=splits)
    environment = study.describe(config, dataset, model.weights)
    environment["checkpoint_sha256"] = model.sha256
    predict = make_predict(model.network, model.spec, mesh, config["eval"]["batch_size"])
    predictions = predict_splits(predict, model.variables, dataset, splits)
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        notes = [f"Checkpoint of epoch {model.epoch} of {config['eval']['run']}."]
        reporting.finish(request, environment, predictions, [], notes)


def _splits(config: dict) -> tuple[str, ...]:
    """The splits that `config.eval.splits` names."""
    splits = tuple(part.strip() for part in config["eval"]["splits"].split(","))
    if not set(splits) <= set(SPLITS) or len(set(splits)) < len(splits):
        raise UserError(f"eval.splits={config['eval']['splits']!r}: name some of train,val,test")
    return splits
