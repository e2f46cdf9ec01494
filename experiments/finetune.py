"""Fine-tunes a network on a data set and reports on the test split."""

import jax

from experiments import study
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.augment.policy import make_augment
from medtl_jax.data.loader import steps_per_epoch
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import class_weights, cross_entropy
from medtl_jax.report.predict import predict_splits, score_splits, write_predictions
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import LoopSettings, best_epoch, fit
from medtl_jax.training.step import StepParts, create_state, evaluation_variables
from medtl_jax.transfer.groups import HIGH, assign_stages, label_tree
from medtl_jax.transfer.optim import make_optimizer, make_schedules


def resolve(config: dict) -> dict:
    """The config as it takes effect.

    Without pretrained weights there is nothing to keep or to move slowly: every stage is then
    in the group `high`.
    """
    if config["model"]["weights"] != "none":
        return config
    groups = {"frozen": "", "low": "", "high": ".*"}
    return {**config, "transfer": {**config["transfer"], "groups": groups}}


def run(request: Request) -> None:
    """Trains, or continues, the run of `request`; UserError before anything is written."""
    config, console, folder = request.config, request.console, request.folder
    runs.check_folder(folder, config)
    if runs.is_finished(folder):
        console.note(f"{folder} is finished; for another run choose another --workdir")
        study.say_result(folder, runs.read_json(folder / runs.METRICS), console)
        return
    settings = LoopSettings(
        epochs=config["train"]["epochs"],
        batch_size=config["data"]["batch_size"],
        patience=config["train"]["patience"],
        select=config["train"]["select"],
        seed=config["seed"],
    )
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("data.batch_size", settings.batch_size, mesh)
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    dataset = study.read_data(config, console)
    train = dataset.splits["train"]
    steps = steps_per_epoch(len(train), settings.batch_size)
    schedules = make_schedules(config["optim"], settings.epochs * steps, steps)

    network, spec = study.make_model(config["model"], len(dataset.spec.classes))
    table = assign_stages((*spec.stages, spec.head), config["transfer"]["groups"])
    variables, report = study.initial_variables(network, spec, config["model"], config["seed"])
    console.note(str(report) if report else "weights: none, every stage starts at random")
    if not 0 <= config["train"]["ema"] < 1:
        raise UserError(f"train.ema={config['train']['ema']} must lie in 0 <= decay < 1")
    weights = class_weights(
        train.labels, len(dataset.spec.classes), config["train"]["class_weights"]
    )
    parts = StepParts(
        model=network,
        spec=spec,
        optimizer=make_optimizer(
            config["optim"], label_tree(variables["params"], table), schedules
        ),
        table=table,
        terms=((1.0, cross_entropy(weights, config["train"]["label_smoothing"])),),
        augment=make_augment(config["augment"]),
        ema_decay=config["train"]["ema"],
    )
    state = create_state(variables, parts)

    environment = {
        **runs.describe_environment(),
        "data": study.data_card(dataset, config["model"]["image_size"]),
        "weights": {
            "name": config["model"]["weights"],
            "sha256": report.sha256 if report else "",
            "report": str(report or "no pretrained weights"),
        },
    }
    environment["data_sha256"] = environment["data"]["sha256"]
    environment["weights_sha256"] = environment["weights"]["sha256"]
    runs.open_folder(folder, config, environment)

    predict = make_predict(network, spec, mesh, config["eval"]["batch_size"])
    checkpoints = Checkpoints(folder / "checkpoints")
    history = fit(
        state,
        parts,
        {name: dataset.splits[name] for name in ("train", "val")},
        dataset.spec.classes,
        settings,
        schedules if _uses_low(table) else {HIGH: schedules[HIGH]},
        predict,
        mesh,
        checkpoints,
        folder,
        console,
    )
    chosen = best_epoch(history, settings.select)
    best = checkpoints.restore_best(chosen, jax.eval_shape(lambda: evaluation_variables(state)))
    checkpoints.close()
    predictions = predict_splits(predict, best, dataset, ("val", "test"))
    write_predictions(folder / "predictions.npz", predictions)
    metrics = score_splits(
        predictions,
        dataset.spec.classes,
        resamples=config["eval"]["resamples"],
        seed=config["seed"],
    )
    history = [{**record, "best": record["epoch"] == chosen} for record in history]
    notes = [f"Epoch {chosen} of {len(history)} chosen by validation {settings.select}."]
    study.finish(request, dataset, environment, predictions, metrics, history, notes)


def _uses_low(table: dict[str, str]) -> bool:
    return "low" in table.values()
