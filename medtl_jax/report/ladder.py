"""A ladder of strategies: its table as Markdown, for the terminal too, and one self-contained page.

A rung is one strategy trained on one fraction of the labels, with several seeds.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from matplotlib.figure import Figure

from medtl_jax.metrics.seeds import Estimate, Judged
from medtl_jax.report.markup import bullets, pictures, section, side_by_side, subsection, table
from medtl_jax.report.study_page import (
    Cells,
    Study,
    entry_of,
    markdown_page,
    mean_text,
    notes_section,
    scores_text,
    signed_table,
    size_text,
    spread_text,
    unit_of,
    write_study,
)
from medtl_jax.report.style import with_interval
from medtl_jax.report.tables import label_of, printable

_MEGABYTE = 1e6
_ALONE = (
    "A run alone has the result that it has here; heads that were trained together with those of "
    "other seeds have it to float tolerance."
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Means over the seeds; None where it is not known.

    Attributes:
      seconds: of the clock, for features, probe and training, whoever computed the features.
      device_seconds: of all processors or of all accelerators, as `Ladder.device` says.
      step_bytes: peak memory of one compiled training step without the data set, the most of the
        seeds; None where none was compiled.
      compile_seconds: of the clock, for compilation, which is in neither of the other two.
    """

    seconds: float | None
    device_seconds: float | None
    step_bytes: float | None
    compile_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Rung:
    """A strategy at one fraction of the labels.

    Attributes:
      strategy: its name.
      folders: the run folder of each seed.
      validation: the value of `Ladder.select` of each seed, None where undefined.
      test: each primary metric over the seeds.
      against: its difference to the reference, empty of the reference itself.
      cost: of a run.
    """

    strategy: str
    folders: tuple[str, ...]
    validation: tuple[float | None, ...]
    test: Mapping[str, Estimate]
    against: Mapping[str, Judged]
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Level:
    """All strategies at one fraction of the labels.

    Attributes:
      fraction: of the training images.
      images: labelled images that each seed trained on.
      val_images: labelled images that each seed chose by.
      drawn: whether each seed trained on images of its own draw.
      rungs: one for each strategy, the same ones at every level.
      picked: the strategy chosen on validation, `""` where none could be.
    """

    fraction: float
    images: tuple[int, ...]
    val_images: tuple[int, ...]
    drawn: bool
    rungs: tuple[Rung, ...]
    picked: str


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The result of strategies x fractions x seeds on one test split.

    Attributes:
      levels: at least one, by growing fraction.
      summaries: what each strategy is.
      settings: flat keys of the config that each strategy sets, as they take effect.
      reference: the strategy that the others are compared with.
      select: the validation value that picks.
      seeds: how many.
      images, patients: of the test split; patients None where they are not known.
      device: `CPU` or `GPU`, what `Cost.device_seconds` counts.
      notes: what the runs warned of, with the strategies that it is of.
    """

    levels: tuple[Level, ...]
    summaries: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]]
    reference: str
    select: str
    seeds: int
    images: int
    patients: int | None
    device: str
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The primary metrics."""
        return tuple(self.levels[0].rungs[0].test)


def percent(fraction: float) -> str:
    """Returns a fraction as a number of per cent: `0.1` is `10`, `0.025` is `2.5`."""
    return f"{100 * fraction:.6g}"


def ladder_table(ladder: Ladder) -> str:
    """Returns the tables of all fractions, the picks and how to read them, as Markdown."""
    tables: list[str | Cells] = []
    for level in ladder.levels:
        tables.append(f"**{_heading(ladder, level)}**")
        tables += [_table_of(ladder, level, metric) for metric in ladder.metrics]
    return markdown_page(picks(ladder), tables, reading(ladder), ladder.notes)


def picks(ladder: Ladder) -> list[str]:
    """Returns for each fraction which strategy validation picks and what it does on the test."""
    lines = []
    for level in ladder.levels:
        share = f"{percent(level.fraction)}% of the labels ({_sizes(level)})"
        if not level.picked:
            lines.append(f"{share}: no strategy has a validation {ladder.select} to pick by")
            continue
        rung = next(rung for rung in level.rungs if rung.strategy == level.picked)
        lines.append(f"{share}: validation picks {level.picked}; test {scores_text(rung.test)}")
    return lines


def reading(ladder: Ladder) -> list[str]:
    """Returns what one has to know to read the table, a line each."""
    size = size_text(ladder.images, ladder.patients)
    return [
        f"Test split: {size}, the same for every run; means over {ladder.seeds} "
        f"seed{'s' * (ladder.seeds > 1)}.",
        f"Labels: at every fraction {val_images(ladder)} come on top. Penalty, k, epoch and the "
        "strategy picked are chosen by their labels.",
        *_covered(ladder),
        f"A difference is the strategy minus {ladder.reference} at the same fraction, paired by "
        "seed and by test image. Its verdict takes a p of at most 0.05 after Holm's correction "
        "over all strategies and metrics of that fraction; “cannot tell” is not “equal”.",
        f"Picked: the best mean validation {ladder.select} at that fraction. The test split has "
        "no part in it.",
        f"{ladder.device} s: seconds of all {ladder.device}s in use, the mean of one run without "
        "compilation, with features and probe also where they were read from the cache. MB: peak "
        "memory of one compiled training step as XLA reports it, without the data set; none where "
        "there is no such step.",
    ]


def _covered(ladder: Ladder) -> list[str]:
    """What the intervals cover, which depends on what the seeds have of their own."""
    unit = unit_of(ladder.patients)
    tested = f"other test {unit} (bootstrap, the same draws for every run)"
    if ladder.seeds == 1:
        one = "one seed says nothing of how another training would end."
        return [f"The 95 % intervals cover {tested} only: {one}"]
    lines = [
        f"The 95 % intervals cover {tested} and other seeds; ladder.json has the two apart. sd is "
        "the standard deviation over the seeds alone."
    ]
    drawn = [percent(level.fraction) for level in ladder.levels if level.drawn]
    whole = [percent(level.fraction) for level in ladder.levels if not level.drawn]
    if drawn:
        lines.append(
            f"At {_listed(drawn)} % of the labels a seed is another draw of training images, first "
            "head and order. The draws overlap, the more the larger they are, so that sets of "
            "new images would differ by more than the seeds do."
        )
    if whole:
        lines.append(
            f"At {_listed(whole)} % all seeds train on the same images: a seed is another first "
            "head and order. Nothing in k-NN and probe is left to chance there, and their "
            f"intervals cover test {unit} alone."
        )
    return lines


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _heading(ladder: Ladder, level: Level) -> str:
    return (
        f"{percent(level.fraction)}% of the labels: {_sizes(level)}, "
        f"{ladder.seeds} seed{'s' * (ladder.seeds > 1)}"
    )


def _sizes(level: Level) -> str:
    return f"{_count(level.images)} images + {_count(level.val_images)} of validation"


def val_images(ladder: Ladder) -> str:
    """Returns how many labelled images every run chose by, as words: `200 validation images`."""
    counts = [count for level in ladder.levels for count in level.val_images]
    return f"{_count(counts)} validation images"


def _count(images: Sequence[int]) -> str:
    least, most = min(images), max(images)
    return str(least) if least == most else f"{least} to {most}"


def _table_of(ladder: Ladder, level: Level, metric: str) -> Cells:
    """Head and rows of one fraction and metric, all of them text; costs stand by the first one."""
    head = ["strategy", f"{label_of(metric)} (95 % CI)", "verdict"]
    head += [f"minus {ladder.reference} (95 % CI)", "sd"]
    first = metric == ladder.metrics[0]
    if first:
        head += [f"val {ladder.select}", f"{ladder.device} s", "MB"]
    rows = []
    for rung in level.rungs:
        found, judged = rung.test[metric], rung.against.get(metric)
        row = [rung.strategy + (" (picked)" if rung.strategy == level.picked else "")]
        row.append(with_interval(entry_of(found)))
        row += [judged.verdict, with_interval(entry_of(judged.estimate))] if judged else ["", ""]
        row.append(spread_text(found.spread))
        if first:
            row += [mean_text(rung.validation), *cost_cells(rung.cost)]
        rows.append(row)
    return head, rows


def cost_cells(cost: Cost) -> tuple[str, str]:
    """Returns device seconds and megabytes of a step as words, empty where they are not known."""
    memory = "" if cost.step_bytes is None else f"{cost.step_bytes / _MEGABYTE:.0f}"
    return _seconds(cost.device_seconds), memory


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write_ladder(
    path: pathlib.Path,
    *,
    ladder: Ladder,
    figures: Mapping[str, Figure],
    **study: Unpack[Study],
) -> None:
    """Writes the page of a ladder to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file.
      ladder: what was found.
      figures: see `ladder_figures.ladder_figures`.
      study: title, commands, configuration and environment.

    Raises:
      UserError: the file cannot be written.
    """
    strategies = [
        (name, words, "; ".join(f"{key}={value}" for key, value in ladder.settings[name].items()))
        for name, words in ladder.summaries.items()
    ]
    sections = [
        section("Which strategy", bullets(picks(ladder))),
        side_by_side(list(pictures(figures).values())),
        section("All strategies", "".join(_level(ladder, level) for level in ladder.levels)),
        section("How to read it", bullets(reading(ladder))),
        section("The strategies", table(("strategy", "what it is", "what it sets"), strategies)),
        notes_section(ladder.notes),
        section("Costs", "".join(_costs(ladder, level) for level in ladder.levels)),
    ]
    write_study(path, sections, alone=[_ALONE], **study)


def _level(ladder: Ladder, level: Level) -> str:
    """The tables of one fraction, a verdict with its sign."""
    parts = [signed_table(*_table_of(ladder, level, metric)) for metric in ladder.metrics]
    return subsection(_heading(ladder, level), "".join(parts))


def _costs(ladder: Ladder, level: Level) -> str:
    head = ("strategy", "seconds", f"{ladder.device} seconds", "MB of a step")
    rows = [
        (printable(rung.strategy), _seconds(rung.cost.seconds), *cost_cells(rung.cost))
        for rung in level.rungs
    ]
    return subsection(_heading(ladder, level), table(head, rows, numbers=True))
