"""Scores the best checkpoint of a run on labelled images, its own or others.

    python launch.py --config=configs/finetune.py --config.experiment=evaluate \\
        --config.eval.run=RUN --config.data.name=folder --config.data.dir=DIR

The model comes from the run folder; of the config only `data` and `eval` take part.
"""

from experiments import study
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.npz import SPLITS
from medtl_jax.errors import UserError
from medtl_jax.report.predict import predict_splits
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict


def resolve(config: dict) -> dict:
    """The config as it is."""
    return config


def run(request: Request) -> None:
    """Writes predictions, metrics and the report of `config.eval.splits`."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    splits = tuple(part.strip() for part in config["eval"]["splits"].split(","))
    if not set(splits) <= set(SPLITS) or len(set(splits)) < len(splits):
        raise UserError(f"eval.splits={config['eval']['splits']!r}: name some of train,val,test")
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    trained = study.open_run(config["eval"]["run"])
    data = {**config, "model": trained.config["model"]}
    dataset = study.read_data(data, console, classes=trained.classes, splits=splits)
    environment = study.describe(data, dataset, trained.report)
    runs.open_folder(folder, config, environment)
    predict = make_predict(trained.network, trained.spec, mesh, config["eval"]["batch_size"])
    predictions = predict_splits(predict, trained.variables, dataset, splits)
    notes = [f"Checkpoint of epoch {trained.epoch} of {config['eval']['run']}."]
    study.finish(request, dataset, environment, predictions, [], notes)
