"""Fine-tunes a network on a data set and reports on the test split."""

import contextlib
import functools
from collections.abc import Sequence, Set

from experiments import adaptation, domain_settings, forgetting, reporting, study
from experiments.augmentation import resolve_augmentation
from experiments.packing import may_share, programs_of
from experiments.prepared import Prepared, prepare
from experiments.settings import OWN_RATE, default_section
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.ensemble.members import fit_members
from medtl_jax.metrics.calibration import FITTED_ON
from medtl_jax.models.backbone import SOURCE_HEAD
from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.process import is_writer
from medtl_jax.report.predict import predict_scores, predict_splits
from medtl_jax.report.tensorboard import EventWriter
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import Keeping, fit
from medtl_jax.training.selection import best_epoch
from medtl_jax.transfer.groups import assign_stages, default_groups
from medtl_jax.transfer.phases import AUTO_PHASES, default_phases
from medtl_jax.weights.pretrained import save_weights


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it takes effect, wherever its values were `given`.

    Where the study has no groups of its own they are `default_groups`; without pretrained weights
    there is nothing to keep or to move slowly, and every stage is in the group `high`. A csv with
    masks is a segmentation. `augment.preset` sets the strengths that were not given.
    """
    config = resolve_augmentation(config, given)
    masks = config["data"]["name"] == "csv" and config["data"]["csv_mask_column"]
    config = {**config, "task": config["task"] or ("segment" if masks else "")}
    model, groups = config["model"], config["transfer"]["groups"]
    rates = {key: model[key] for key in ("dropout", "drop_path") if model[key] != OWN_RATE}
    network, spec = create_model(
        model["name"],
        1,
        auxiliary=model["auxiliary"] > 0,
        decoder=study.decoder_widths(config),
        **rates,
    )
    rates = {key: getattr(network, key) for key in ("dropout", "drop_path")}
    if groups == default_section("transfer")["groups"]:
        if model["weights"] == "none":
            groups = {"frozen": "", "low": "", "high": ".*"}
        else:
            # A decoder reads the early maps too, and they need not be those of photographs.
            freeze = config["task"] != "segment"
            groups = default_groups(spec.stages, study.new_parts(config), freeze)
    transfer = {**config["transfer"], "groups": groups}
    if transfer["phases"] == AUTO_PHASES:
        table = assign_stages((*spec.stages, *study.new_parts(config)), groups)
        transfer["phases"] = default_phases(spec.stages, study.new_parts(config), table)
    config = {**config, "model": {**model, **rates}, "transfer": transfer}
    return domain_settings.resolve_domain(config)


def run(request: Request) -> None:
    """Trains, or continues, the run of `request`; UserError before anything is written.

    A run that has a checkpoint goes on from there, and its pretrained weights may be gone.
    """
    run_all([request])


def run_all(requests: Sequence[Request]) -> None:
    """Trains, or continues, several runs as `run` does; as one program where that is faster.

    See `config.train.program`.
    """
    # Of runs that cannot share a program, no two are held at once.
    held = all(may_share(request.config) for request in requests)
    for batch in [requests] if held else [[request] for request in requests]:
        _run_batch(batch)


def _run_batch(requests: Sequence[Request]) -> None:
    begun = []
    for request in requests:
        runs.check_folder(request.folder, request.config)
        if runs.is_finished(request.folder):
            reporting.say_finished(request)
        else:
            begun.append((request, prepare(request)))
    with contextlib.ExitStack() as stack:
        for request, prepared in begun:
            runs.open_folder(request.folder, request.config, prepared.environment)
            stack.enter_context(runs.hold(request.folder))
        for members in programs_of(begun):
            for (request, prepared), history in zip(members, _train(members), strict=True):
                _report(request, prepared, history)


def _train(members: Sequence[tuple[Request, Prepared]]) -> list[list[dict]]:
    """The epoch records of each run; the best epoch's variables are in its checkpoints."""
    parts = members[0][1].parts
    size = members[0][0].config["eval"]["batch_size"]
    mesh = members[0][1].training.mesh
    predict = make_predict(members[0][1].network, parts.spec, mesh, size, parts.start)
    with contextlib.ExitStack() as stack:
        keepings = [_keeping(stack, request, prepared) for request, prepared in members]
        if len(members) == 1:
            (_, prepared), (keeping,) = members[0], keepings
            return [fit(prepared.training, prepared.state, predict, keeping)]
        trainings = [prepared.training for _, prepared in members]
        states = [prepared.state for _, prepared in members]
        program = members[0][0].config["train"]["program"]
        return fit_members(trainings, states, predict, keepings, program)


def _keeping(stack: contextlib.ExitStack, request: Request, prepared: Prepared) -> Keeping:
    """Where the run leaves what it makes; what training begins with is left there at once."""
    checkpoints = stack.enter_context(Checkpoints(request.folder / "checkpoints"))
    epoch = checkpoints.last_epoch()
    if epoch is None:
        reporting.begin_cost(request)
    if epoch is None and prepared.pretrained:
        state = prepared.state
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        checkpoints.save_initial(adaptation.for_source(variables))
    if not is_writer():
        return Keeping(checkpoints, request.folder, request.console)
    # Events after the last checkpoint are written anew.
    steps = prepared.environment["training"]["steps_per_epoch"]
    step = None if epoch is None else epoch * steps + 1
    events = stack.enter_context(EventWriter(request.folder / runs.EVENTS, step))
    return Keeping(checkpoints, request.folder, request.console, events.epoch)


def _report(request: Request, prepared: Prepared, history: list[dict]) -> None:
    """Takes the best epoch and writes predictions, figures and report."""
    config, training, network = request.config, prepared.training, prepared.network
    task, spec, validator = training.task, prepared.parts.spec, training.chosen_by
    chosen = best_epoch(history, validator)
    size = config["model"]["image_size"]
    shapes = variable_shapes(network, size)
    with Checkpoints(request.folder / "checkpoints", read_only=True) as checkpoints:
        kept = variable_shapes(adaptation.with_domains(config, network), size)
        variables = checkpoints.restore_best(chosen, kept)
        before = checkpoints.restore_initial(shapes) if prepared.pretrained else None
    best = adaptation.for_target(config, variables)
    save_weights(request.folder / runs.WEIGHTS, _without_source_head(best), spec, task)
    predict = make_predict(network, spec, training.mesh, config["eval"]["batch_size"])
    source = adaptation.for_source(variables)
    score = functools.partial(predict_scores, predict, source, task=task)
    predictions = predict_splits(score, prepared.dataset, ("val", "test"))
    notes = [f"Epoch {chosen} of {len(history)} chosen by {validator.summary}."]
    if prepared.domains:
        score = functools.partial(predict_scores, predict, best, task=task)
        predictions = adaptation.with_target(predictions, score, prepared.domains)
        notes += adaptation.reading(config, prepared.domains)
    # What is shown are the images of the test, and what the network made of them.
    shown = best if "test" in predictions else source
    calibration = reporting.calibrate(config, task, predictions)
    measured = before and config["eval"]["drift"]
    drift = forgetting.measure_drift(request, prepared, before, source) if measured else None
    reporting.finish(
        request,
        prepared.environment,
        study.Fitted(network, spec, shown, task),
        predictions,
        calibration,
        [{**record, "best": record["epoch"] == chosen} for record in history],
        notes,
        FITTED_ON,
        drift,
        prepared.dataset.splits["train"],
    )


def _without_source_head(variables: dict) -> dict:
    """What another run may load: a file of weights has one classifier."""
    params = {name: tree for name, tree in variables["params"].items() if name != SOURCE_HEAD}
    return {**variables, "params": params}
