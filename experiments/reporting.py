"""From predictions to what a run folder shows: metrics, figures and the report."""

import pathlib

from experiments.study import Request
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.errors import UserError
from medtl_jax.metrics.scores import confusion
from medtl_jax.report import figures
from medtl_jax.report.html import write_report
from medtl_jax.report.predict import Predictions, score_splits, write_predictions
from medtl_jax.report.tables import metrics_table


def draw_figures(predictions: Predictions, classes: tuple[str, ...], metrics: dict) -> dict:
    """The figures of one split: metrics, confusion, ROC and examples."""
    target, score = predictions.target, predictions.score
    chosen = figures.choose_examples(target, score)
    return {
        "metrics": figures.metrics_figure(metrics),
        "confusion": figures.confusion_figure(confusion(target, score), classes),
        "roc": figures.roc_figure(target, score, classes, metrics),
        "examples": figures.examples_figure(
            predictions.images[chosen],
            target[chosen],
            score[chosen],
            classes,
            predictions.ids[chosen],
        ),
    }


def finish(
    request: Request,
    environment: dict,
    predictions: dict[str, Predictions],
    history: list[dict],
    notes: list[str],
) -> None:
    """Writes predictions, figures, report and, last of all, `metrics.json`; prints the table."""
    folder, config, data = request.folder, request.config, environment["data"]
    classes = tuple(data["classes"])
    write_predictions(folder / "predictions.npz", predictions)
    resamples = config["eval"]["resamples"]
    metrics = score_splits(predictions, classes, resamples=resamples, seed=config["seed"])
    split = _shown(metrics)
    drawn = draw_figures(predictions[split], classes, metrics[split])
    if history:
        drawn["curves"] = figures.curves_figure(history)
    figures.save_figures(drawn, folder / "figures")
    write_report(
        folder / "report.html",
        title=f"{config['experiment']}: {data['name']}",
        command=request.command,
        config=config,
        environment={key: value for key, value in environment.items() if key != "data"},
        data=data,
        history=history,
        metrics=metrics,
        figures=drawn,
        notes=notes,
    )
    runs.write_json(folder / runs.METRICS, metrics)
    _say(folder, metrics, request.console)


def say_finished(request: Request) -> None:
    """Prints the result of a run that ended earlier. UserError if its metrics are damaged."""
    path = request.folder / runs.METRICS
    request.console.note(f"{request.folder} is finished; for another run name another --workdir")
    try:
        _say(request.folder, runs.read_json(path, most_bytes=100_000_000), request.console)
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{path} is damaged; delete it to have it written again") from None


def _say(folder: pathlib.Path, metrics: dict, console: Console) -> None:
    split = _shown(metrics)
    console.note(f"\n{split} split\n{metrics_table(metrics[split])}")
    console.note(f"\nreport: {folder / 'report.html'}")


def _shown(metrics: dict) -> str:
    return "test" if "test" in metrics else next(reversed(metrics))
