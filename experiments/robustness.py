"""What averaging over views of an image gains, and what damage to the images costs: on request."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.augmentation import augments_training
from experiments.study import Fitted, Request
from experiments.trained import run_folder
from medtl_jax import runs
from medtl_jax.augment.corruptions import NAMES, SEVERITIES, corrupt
from medtl_jax.console import Console
from medtl_jax.data.catalog import Array
from medtl_jax.data.streams import Streamed, is_streamed
from medtl_jax.errors import UserError
from medtl_jax.metrics.compare import Comparison, compare_runs
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report.comparison_figures import defined
from medtl_jax.report.predict import Predictions, predict_scores, write_predictions
from medtl_jax.report.robustness import corruptions_figure, corruptions_text, tta_text
from medtl_jax.report.tables import SOURCE_TEST
from medtl_jax.training.devices import DataMesh, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.views import make_view_predict, view_transforms

TTA, CORRUPTIONS = "tta.json", "corruptions.json"
# What was averaged over views, in the form of `predictions.npz`.
AVERAGED = "tta.npz"


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What was measured of one split.

    Attributes:
      tta: the content of `tta.json`, see `measure_views`; None where it was not asked for.
      corruptions: that of `corruptions.json`, see `measure_corruptions`; None likewise.
      notes: what was asked for and could not be measured.
    """

    tta: dict | None = None
    corruptions: dict | None = None
    notes: tuple[str, ...] = ()

    def figures(self) -> dict[str, Figure]:
        """The figures by name, those that there are."""
        return {"corruptions": corruptions_figure(self.corruptions)} if self.corruptions else {}


def measure_robustness(
    request: Request,
    fitted: Fitted,
    predictions: dict[str, Predictions],
    metrics: dict[str, dict],
    split: str,
) -> Robustness:
    """What `config.eval.tta` and `config.eval.corruptions` ask for, written and printed.

    A brief request measures nothing.

    Args:
      request: whose folder gets the files.
      fitted: that made the `predictions` of `split`.
      predictions, metrics: of each split, `metrics` as `metrics.json` has them.
      split: to measure.
    """
    config, console = request.config, request.console
    asked = [name for name in ("tta", "corruptions") if config["eval"][name]]
    if request.brief or not asked:
        return Robustness()
    if split == SOURCE_TEST:
        names = " and ".join(f"eval.{name}" for name in asked)
        note = f"Nothing measured for {names}: the target's test split has no labels."
        console.note(f"note: {note}")
        return Robustness(notes=(note,))
    mesh, found = data_mesh(config["train"]["devices"]), predictions[split]
    tta = corruptions = None
    if "tta" in asked:
        measured, averaged = measure_views(request, fitted, mesh, found)
        tta = {"split": split, **measured}
        write_predictions(request.folder / AVERAGED, {split: averaged})
        runs.write_json(request.folder / TTA, tta, sort_keys=False)
        console.note(f"\n{tta_text(tta)}")
    if "corruptions" in asked:
        measured = measure_corruptions(request, fitted, mesh, found)
        names = measured[NAMES[0]][0]
        clean = {name: entry for name, entry in metrics[split].items() if name in names}
        corruptions = {
            "split": split,
            "task": fitted.task.name,
            "severities": list(SEVERITIES),
            "clean": clean,
            "corruptions": measured,
        }
        runs.write_json(request.folder / CORRUPTIONS, corruptions, sort_keys=False)
        console.note(f"\n{corruptions_text(corruptions)}")
    return Robustness(tta, corruptions)


def say_measured(folder: pathlib.Path, console: Console) -> None:
    """Prints what `measure_robustness` has left in a folder; UserError for a damaged file."""
    for name, text in ((TTA, tta_text), (CORRUPTIONS, corruptions_text)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            console.note(f"\n{text(runs.read_json(path))}")
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(
                f"{path} is damaged; delete it, and measure it again with experiment=evaluate"
            ) from None


def measure_views(
    request: Request, fitted: Fitted, mesh: DataMesh, found: Predictions
) -> tuple[dict, Predictions]:
    """What averaging over the views changes of each metric, JSON-ready; and what was averaged.

    `{"views", "transforms": {name: strength}, "trained": bool, "n", "n_patients" or None,
    "primary": [metric], "metrics": {metric: {"plain", "tta", "difference", "ci95", "p", "p_holm",
    "test", "verdict", "reason"}}}`: paired, as `metrics.compare` does it; None where undefined.
    `trained` is whether the network was trained on images that these transforms draw too.
    """
    config, task = request.config, fitted.task
    masks, options = task.name == "segment", config["eval"]
    predict = make_view_predict(
        fitted.network,
        fitted.spec,
        mesh,
        options["batch_size"],
        augment=config["augment"],
        views=options["tta"],
        seed=config["seed"],
        ids=found.ids,
        masks=masks,
    )
    score = predict_scores(predict, fitted.variables, found.images, task)
    both = [
        Predicted(name, task.name, task.classes, found.ids, found.target, scored, found.patients)
        for name, scored in (("plain", found.score), ("tta", score))
    ]
    with request.console.progress("test-time augmentation") as advance:
        (comparison,) = compare_runs(
            both,
            resamples=options["resamples"],
            seed=config["seed"],
            tolerance=options["surface_tolerance"],
            advance=lambda done, total: advance(done, total, "draws"),
        )
    patients = found.patients
    card = {
        "views": options["tta"],
        "transforms": view_transforms(config["augment"], masks),
        "trained": augments_training(_of_training(config)),
        "n": len(found.ids),
        "n_patients": None if patients is None else len(np.unique(patients)),
        "primary": [name for name in comparison.primary if name in comparison.metrics],
        "metrics": _differences(comparison),
    }
    return card, dataclasses.replace(found, score=score)


def _of_training(config: dict) -> dict:
    """`config` with the experiment by which the network was trained."""
    if config["experiment"] != "evaluate":
        return config
    return {**config, "experiment": runs.read_json(run_folder(config) / runs.CONFIG)["experiment"]}


def _differences(comparison: Comparison) -> dict[str, dict]:
    return {
        name: {
            "plain": defined(found.first),
            "tta": defined(found.second),
            "difference": defined(found.difference),
            "ci95": None if found.interval is None else list(found.interval),
            "p": defined(found.p),
            "p_holm": defined(found.adjusted),
            "test": found.test,
            "verdict": found.verdict,
            "reason": found.reason,
        }
        for name, found in comparison.metrics.items()
    }


def measure_corruptions(
    request: Request, fitted: Fitted, mesh: DataMesh, found: Predictions
) -> dict[str, list[dict]]:
    """`{corruption: [{metric: entry} of each severity]}` of the overall metrics of the task.

    The entries are those of `metrics.json`; of several predicted numbers each has its own, as they
    have no common unit. Distances between surfaces are left out: they take
    longest. The temperature and the thresholds of the run are not used.
    """
    config, task = request.config, fitted.task
    size, seed = config["eval"]["batch_size"], config["seed"]
    predict = make_predict(fitted.network, fitted.spec, mesh, size)
    score = functools.partial(predict_scores, predict, fitted.variables, task=task)
    measured = {name: [] for name in NAMES}
    total = len(NAMES) * len(SEVERITIES)
    with request.console.progress("corruptions") as advance:
        for name in NAMES:
            for severity in SEVERITIES:
                images = corrupted(found.images, found.ids, name, severity, seed)
                entries = score_with_intervals(
                    task.name,
                    found.target,
                    score(images),
                    task.classes,
                    found.patients,
                    resamples=config["eval"]["resamples"],
                    seed=seed,
                    surfaces=False,
                )
                measured[name].append(
                    {
                        key: entry
                        for key, entry in entries.items()
                        if "/" not in key or task.name == "regress"
                    }
                )
                advance(sum(map(len, measured.values())), total, f"{name} {severity}")
    return measured


def corrupted(images: Array, ids: Sequence[str], name: str, severity: int, seed: int) -> Array:
    """The images `[n, h, w, c]` as `corrupt` damages them; streamed ones when they are asked for.

    The arguments are those of `corruptions.corrupt`, whatever holds the images.
    """

    def damage(row: int) -> np.ndarray:
        return corrupt(name, severity, np.asarray(images[row])[None], seed, [ids[row]])[0]

    rows = Streamed(range(len(images)), damage, images.shape[1:])
    return rows if is_streamed(images) else rows[:]
