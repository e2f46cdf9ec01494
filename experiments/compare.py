"""Says which of several finished runs is better on the same images, and how sure that is.

    python -m experiments.compare RUN RUN ... [--split test] [--out comparison.html]

Every further run is compared with the first: differences with intervals and p-values, and a verdict
for each primary metric, see `medtl_jax.metrics.compare`. The page holds the verdicts, the settings
in which the runs differ, and the figures; `--figures DIR` saves these as PNG files too.
"""

import io
import numbers
import os
import pathlib
import shlex
import sys
import zipfile
from collections.abc import Sequence

import numpy as np

from experiments.ladder_folder import check_no_ladder
from medtl_jax import runs
from medtl_jax.archives import ArchiveError, open_archive, read_entry, read_npy_header
from medtl_jax.commands import Parser, run_tool
from medtl_jax.console import Console
from medtl_jax.data.catalog import TASKS
from medtl_jax.data.images import physical_memory
from medtl_jax.errors import UserError
from medtl_jax.files import is_text, user_path
from medtl_jax.metrics.compare import Predicted, compare_runs
from medtl_jax.report.comparison import ComparedRun, comparison_text, write_comparison
from medtl_jax.report.comparison_figures import MOST_RUNS, comparison_figures
from medtl_jax.report.style import save_figures

_ARRAYS = ("id", "target", "score")
_PATIENT = "patient"
_MOST_METRICS_BYTES = 100_000_000


def main(arguments: Sequence[str]) -> None:
    """Prints the verdicts and writes the page. UserError for runs that cannot be compared."""
    options = _parse(arguments)
    found = [
        read_run(folder, name, options.split)
        for folder, name in zip(options.runs, _names(options.runs), strict=True)
    ]
    tolerance = {"tolerance": _tolerance(found)} if found[0].predicted.task == "segment" else {}
    predicted = [run.predicted for run in found]
    console = Console()
    with console.progress("compare") as advance:
        comparisons = compare_runs(
            predicted,
            resamples=options.resamples,
            seed=options.seed,
            advance=lambda done, total: advance(done, total, ""),
            **tolerance,
        )
    figures = comparison_figures(predicted, [run.metrics for run in found], comparisons)
    console.note(comparison_text(comparisons))
    write_comparison(
        options.out,
        command=f"python -m experiments.compare {shlex.join(arguments)}",
        split=options.split,
        runs=found,
        comparisons=comparisons,
        figures=figures,
        resamples=options.resamples,
    )
    if options.figures:
        save_figures(figures, options.figures)
    console.note(f"\ncomparison: {options.out}")


def _parse(arguments: Sequence[str]):
    parser = Parser("experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--out", default="comparison.html", help="default: %(default)s")
    parser.add_argument("--figures", default="", metavar="DIR", help="for the figures as PNG")
    parser.add_argument("--resamples", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    options = parser.parse_args(arguments)
    if not 2 <= len(options.runs) <= MOST_RUNS:
        raise UserError(f"{len(options.runs)} runs: name 2 to {MOST_RUNS} run folders to compare")
    if options.resamples < 100 or options.seed < 0:
        raise UserError(
            f"--resamples={options.resamples} --seed={options.seed}: want at least 100 resamples "
            "and a seed of at least 0"
        )
    options.out = user_path(options.out, "--out")
    if options.out.is_dir():
        raise UserError(f"--out={options.out} is a folder: name a file")
    _check_folder("--out", options.out.parent)
    if options.figures:
        options.figures = user_path(options.figures, "--figures")
        _check_folder("--figures", options.figures)
    options.runs = [user_path(name, "RUN") for name in options.runs]
    return options


def _check_folder(option: str, folder: pathlib.Path) -> None:
    """Raises UserError unless files can be written to `folder`, which may still have to be made."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {folder} is no place for a file ({error})") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written to" if there.is_dir() else "is a file, no folder"
        raise UserError(f"{option}: {there} {why}; name another place")


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """A short name for each run: the folder's own, the whole path where two have the same."""
    whole = [folder.resolve() for folder in folders]
    for place, folder in enumerate(whole):
        if folder in whole[:place]:
            raise UserError(f"{folders[place]} is named twice: name different run folders")
    short = [folder.name for folder in whole]
    return [
        str(path) if short.count(name) > 1 else name
        for path, name in zip(whole, short, strict=True)
    ]


def read_run(folder: pathlib.Path, name: str, split: str) -> ComparedRun:
    """The run in `folder` with its predictions of `split`. UserError where they are not there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder: there is no such folder")
    config, environment = (
        runs.read_json(folder / file) for file in (runs.CONFIG, runs.ENVIRONMENT)
    )
    check_no_ladder(folder, config)
    if config.get("experiment") == "predict":
        raise UserError(f"{folder} has predictions without labels; name finetune or evaluate runs")
    if config.get("experiment") == "export":
        raise UserError(f"{folder} has an exported network and no predictions; name its run")
    if not runs.is_finished(folder):
        raise UserError(
            f"{folder} is not finished: it has no {runs.METRICS}; give its command again first"
        )
    task, classes = _task(environment, folder / runs.ENVIRONMENT)
    metrics = _entries(folder / runs.METRICS, split)
    arrays = _read_predictions(folder / "predictions.npz", split)
    predicted = Predicted(
        name,
        task,
        classes,
        ids=arrays["id"],
        target=arrays["target"],
        score=arrays["score"],
        patients=arrays.get(_PATIENT),
    )
    return ComparedRun(str(folder), config, environment, metrics, predicted)


def _task(environment: dict, path: pathlib.Path) -> tuple[str, tuple[str, ...]]:
    """Task and classes of the run."""
    data = environment.get("data")
    task, classes = (
        data.get(key) if isinstance(data, dict) else None for key in ("task", "classes")
    )
    if task not in TASKS or not isinstance(classes, list) or not all(map(is_text, classes)):
        raise UserError(f"{path} names no task and classes: not written by this version")
    return task, tuple(classes)


def _tolerance(found: Sequence[ComparedRun]) -> float:
    """Of the normalised surface distance, the same in all runs: their bars stand side by side."""
    values = []
    for run in found:
        section = run.config.get("eval")
        value = section.get("surface_tolerance") if isinstance(section, dict) else None
        if not _is_number(value) or value < 0:
            raise UserError(f"{run.folder}: its config has no eval.surface_tolerance of 0 or more")
        if values and value != values[0]:
            raise UserError(
                f"{found[0].folder} and {run.folder} have eval.surface_tolerance={values[0]:g} and "
                f"{value:g}: evaluate them with the same one"
            )
        values.append(float(value))
    return values[0]


def _entries(path: pathlib.Path, split: str) -> dict[str, dict]:
    """The metrics of one split, checked."""
    metrics = runs.read_json(path, most_bytes=_MOST_METRICS_BYTES)
    if split not in metrics:
        raise UserError(f"{path.parent} has no metrics of split {split}: --split={_some(metrics)}")
    entries = metrics[split]
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise UserError(f"{path} is damaged; delete it to have it written again")
    return entries


def _some(names: Sequence[str]) -> str:
    return " or ".join(list(names)[:5])


def _is_entry(entry) -> bool:
    if not isinstance(entry, dict) or "value" not in entry:
        return False
    value, interval = entry["value"], entry.get("ci95")
    return (value is None or _is_number(value)) and (
        interval is None
        or (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval)))
    )


def _is_number(value) -> bool:
    # JSON's whole numbers may be larger than any float; NaN is not within limits either.
    largest = sys.float_info.max
    return (
        isinstance(value, numbers.Real) and type(value) is not bool and -largest <= value <= largest
    )


def _read_predictions(path: pathlib.Path, split: str) -> dict[str, np.ndarray]:
    """The arrays of one split by their short names, checked against each other."""
    try:
        with path.open("rb") as file, open_archive(file) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            names = [*_ARRAYS, *((_PATIENT,) if f"{split}_{_PATIENT}" in entries else ())]
            if missing := [name for name in names if f"{split}_{name}" not in entries]:
                raise ArchiveError(f"it has no {split}_{missing[0]}")
            chosen = {name: entries[f"{split}_{name}"] for name in names}
            if sum(info.file_size for info in chosen.values()) > physical_memory():
                raise ArchiveError("its arrays are larger than this machine's memory")
            arrays = {name: _read_array(archive, info) for name, info in chosen.items()}
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: give the run's command again") from None
    except ArchiveError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for name, array in arrays.items():
        words = name in ("id", _PATIENT)
        fits = array.dtype.kind == "U" if words else array.dtype.kind in "iuf"
        # One axis for words; a target has up to three, a score one more.
        if not fits or array.ndim not in ((1,) if words else (1, 2, 3, 4)):
            raise UserError(f"{path} is damaged: {split}_{name} is {array.dtype} {array.shape}")
        if len(array) != len(arrays["id"]):
            raise UserError(f"{path} is damaged: {split}_{name} has another length than {split}_id")
    return arrays


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    data = read_entry(archive, info)
    stream = io.BytesIO(data)
    read_npy_header(stream, info.filename, len(data))
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


if __name__ == "__main__":
    sys.exit(run_tool(main, sys.argv[1:]))
