"""An ensemble: its tables as Markdown, for the terminal too, and one self-contained page.

A row is a member, a fusion of all members, or a soup, which is one network.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Unpack

from matplotlib.figure import Figure

from medtl_jax.metrics.compare import BETTER
from medtl_jax.metrics.seeds import Estimate, Judged
from medtl_jax.report.markup import (
    bullets,
    note,
    pictures,
    section,
    side_by_side,
    subsection,
    table,
)
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
    unit_of,
    write_study,
)
from medtl_jax.report.style import with_interval
from medtl_jax.report.tables import label_of, printable

MEMBER, FUSION, SOUP = "member", "fusion", "soup"
_MILLION = 1e6
_SHORT = {"ece": "ECE", "brier": "Brier", "nll": "NLL"}
_WHAT = {
    MEMBER: "a run alone",
    SOUP: "the mean of the weights of these members",
}


@dataclasses.dataclass(frozen=True)
class NetworkCost:
    """What an image costs one network: parameters, and milliseconds on the device named."""

    parameters: int
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to predict an image.

    Attributes:
      name: of the row.
      kind: `MEMBER`, `FUSION` or `SOUP`.
      made_of: what it consists of, JSON-ready.
      validation: the value of `Ensemble.select`, of fusions by cross-fitting; None where undefined.
      test: each primary metric.
      against: its difference to the best member; of members nothing.
      calibration: `{"ece": (before, after), ...}` temperature scaling, on the test split; empty
        where scores are no probabilities.
      unscaled: why a temperature was kept at 1, `""` where all could be fitted.
      networks: that an image passes through; `cost` is that of all of them.
    """

    name: str
    kind: str
    made_of: Mapping[str, object]
    validation: float | None
    test: Mapping[str, Estimate]
    against: Mapping[str, Judged]
    calibration: Mapping[str, tuple[float, float]]
    unscaled: str
    networks: int
    cost: NetworkCost


@dataclasses.dataclass(frozen=True)
class Diversity:
    """One measure of every pair of members on the test split, see `metrics.diversity`.

    Attributes:
      pairs: `[m, m]`, NaN where undefined.
      mean: over the pairs of different members.
      reason: what is undefined, and why; `""` if nothing is.
    """

    pairs: tuple[tuple[float, ...], ...]
    mean: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Rejection:
    """The error of the picked fusion when the images it is least certain of are left to a reader.

    Attributes:
      measure: of uncertainty.
      noun: what the error is.
      rejected: shares of the images, rising from 0.
      error: of the images that are kept, at each of them; `oracle` where the worst go first.
      scores: `area`, `area_random`, `area_oracle` and `gain` as entries of `metrics.json`.
    """

    measure: str
    noun: str
    rejected: tuple[float, ...]
    error: tuple[float, ...]
    oracle: tuple[float, ...]
    scores: Mapping[str, dict]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """The result of an ensemble on one test split.

    Attributes:
      rows: members, then fusions, then soups.
      best: the member that is best on validation, `""` where none has a value.
      picked: the fusion that is best on validation, `""` likewise: the ensemble.
      select: the validation value that picks.
      summaries: what each fusion is.
      diversity: of the members, by the name of the measure.
      uncertainty: mean over the test images of each measure.
      rejections: of the picked fusion, by these measures.
      images, patients: of the test split; patients None where they are not known.
      device: that the milliseconds are of.
      batch: images that it is given at a time.
      notes: what the runs warned of, and why there is no soup.
    """

    rows: tuple[Row, ...]
    best: str
    picked: str
    select: str
    summaries: Mapping[str, str]
    diversity: Mapping[str, Diversity]
    uncertainty: Mapping[str, float]
    rejections: tuple[Rejection, ...]
    images: int
    patients: int | None
    device: str
    batch: int
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The primary metrics."""
        return tuple(self.rows[0].test)

    @property
    def members(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == MEMBER)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


def ensemble_table(found: Ensemble) -> str:
    """Returns the verdicts, a table for each metric and how to read them, as Markdown."""
    tables: list[str | Cells] = [_table_of(found, metric) for metric in found.metrics]
    if any(row.calibration for row in found.rows):
        tables += [
            "Calibration on the test split, before and after temperature scaling:",
            _calibration(found),
        ]
    return markdown_page(conclusions(found), tables, reading(found), _notes(found))


def _notes(found: Ensemble) -> list[str]:
    """What the runs and the fits warned of, and what is undefined, and why."""
    fits = {row.name: row.made_of.get("note", "") for row in found.rows}
    diversity = {measure_name(name): one.reason for name, one in found.diversity.items()}
    scaling = {f"temperature of {row.name}": row.unscaled for row in found.rows}
    told = {**fits, **diversity, **scaling}
    return [*found.notes, *(f"{name}: {reason}" for name, reason in told.items() if reason)]


def conclusions(found: Ensemble) -> list[str]:
    """Returns what validation picks, and whether it or any other is a gain, a line each."""
    if not found.picked or not found.best:
        return [f"validation {found.select} picks nothing: no row has a value to pick by"]
    picked, best = found.row(found.picked), found.row(found.best)
    lines = [
        f"validation {found.select} picks {picked.name} of {len(found.members)} members; test "
        f"{scores_text(picked.test)}",
        f"best single member by validation: {best.name}; test {scores_text(best.test)}",
    ]
    lines += [_gain(found, metric) for metric in found.metrics]
    means = [f"{measure_name(name)} {_number(one.mean)}" for name, one in found.diversity.items()]
    lines.append(f"members differ: mean over their pairs {', '.join(means)}")
    lines += [_rejection(found, one) for one in found.rejections]
    return lines


def _gain(found: Ensemble, metric: str) -> str:
    """What the picked fusion gains, and which others do."""
    judged = found.row(found.picked).against[metric]
    others = [
        row.name
        for row in found.rows
        if row.against and row.against[metric].verdict == BETTER and row.name != found.picked
    ]
    gained = judged.verdict == BETTER
    told = judged.verdict + ("" if gained else ", no gain shown")
    also = f"better{' too' * gained}: {', '.join(others)}" if others else "no other row is better"
    change = with_interval(entry_of(judged.estimate))
    return f"{label_of(metric)}: {found.picked} minus {found.best}: {change}: {told}; {also}"


def _rejection(found: Ensemble, one: Rejection) -> str:
    """What a measure of uncertainty is worth."""
    area, gain = (with_interval(one.scores[name]) for name in ("area", "gain"))
    return (
        f"{printable(one.measure)}: mean {_number(found.uncertainty[one.measure])}; {one.noun} "
        f"of what is kept, area {area}, {gain} of the way from chance to an oracle"
    )


def measure_name(name: str) -> str:
    """Returns the name of a measure of diversity for readers."""
    return {"q": "Yule's Q", "kappa": "Cohen's kappa"}.get(name, name.replace("_", " "))


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"


def reading(found: Ensemble) -> list[str]:
    """Returns what one has to know to read the table, a line each."""
    lines = [
        f"Test split: {size_text(found.images, found.patients)}, the same for every row. The 95 % "
        f"intervals cover other test {unit_of(found.patients)}, not other trainings.",
        f"A difference is the row minus {found.best or 'the best member'}, the member with the "
        "best validation value, on the same images. Its verdict takes a p of at most 0.05 after "
        "Holm's correction over all fusions, soups and metrics; p is after it; “cannot tell” is "
        "not “equal”.",
        f"Fusions are fitted on the validation split, and picked by the validation {found.select} "
        "of predictions that were cross-fitted there: each image by a fusion fitted without it. "
        "The test split has no part in it. Members, and the networks of a greedy soup, were "
        "chosen by the same images: their validation values are too good.",
        f"networks, M params: what an image passes through. ms: milliseconds an image of all of "
        f"them on this device ({found.device}), {found.batch} images at a time.",
    ]
    if found.rejections:
        lines.append(
            "Area: the mean error of the images that are kept while those with the most "
            "uncertainty are left to a reader, one after the other. Entropies are in nats: the "
            "predictive one is that of the members' mean probabilities, the mutual information "
            "its part that the members do not agree on."
        )
    if any(row.kind == SOUP for row in found.rows):
        lines.append(
            "A soup is one network, the mean of the members' weights with batch statistics of its "
            "own (Wortsman et al. 2022). Its members share the pretrained weights, but not the "
            "first values of their heads."
        )
    return lines


def _table_of(found: Ensemble, metric: str) -> Cells:
    """Head and rows of one metric, all of them text; costs stand by the first one."""
    head = ["row", "", f"{label_of(metric)} (95 % CI)", "verdict"]
    head += ["minus the best member (95 % CI)", "p"]
    first = metric == found.metrics[0]
    if first:
        head += [f"val {found.select}", "networks", "M params", "ms"]
    rows = []
    for row in found.rows:
        judged = row.against.get(metric)
        cells = [printable(row.name) + _mark(found, row), row.kind]
        cells.append(with_interval(entry_of(row.test[metric])))
        cells += ["", "", ""]
        if judged:
            cells[-3:] = [judged.verdict, with_interval(entry_of(judged.estimate)), _p(judged)]
        if first:
            cells += [mean_text([row.validation]), str(row.networks)]
            cells += [f"{row.cost.parameters / _MILLION:.3g}", f"{row.cost.milliseconds:.2f}"]
        rows.append(cells)
    return head, rows


def _mark(found: Ensemble, row: Row) -> str:
    if row.name == found.picked:
        return " (picked)"
    return " (best member)" if row.name == found.best else ""


def _p(judged: Judged) -> str:
    return "" if math.isnan(judged.adjusted) else f"{judged.adjusted:.2g}"


def _calibration(found: Ensemble) -> Cells:
    """Head and rows of the calibration of every row that has probabilities."""
    rows = [row for row in found.rows if row.calibration]
    metrics = list(rows[0].calibration)
    head = ["row"]
    head += [f"{_SHORT[metric]} {when}" for metric in metrics for when in ("before", "after")]
    cells = [
        [
            printable(row.name) + _mark(found, row),
            *(_number(value) for metric in metrics for value in row.calibration[metric]),
        ]
        for row in rows
    ]
    return head, cells


def write_ensemble(
    path: pathlib.Path,
    *,
    found: Ensemble,
    figures: Mapping[str, Figure],
    **study: Unpack[Study],
) -> None:
    """Writes the page to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file.
      found: what was found.
      figures: see `ensemble_figures.ensemble_figures`.
      study: title, commands, configuration and environment.

    Raises:
      UserError: the file cannot be written.
    """
    sections = [
        section("Is it a gain", bullets(conclusions(found))),
        section("All rows", "".join(_metric_part(found, metric) for metric in found.metrics)),
        side_by_side(list(pictures(figures).values())),
        section("How to read it", bullets(reading(found))),
        section("What each row is made of", _parts(found)),
        _calibration_part(found),
        notes_section(_notes(found)),
    ]
    write_study(path, list(filter(None, sections)), **study)


def _metric_part(found: Ensemble, metric: str) -> str:
    return subsection(label_of(metric), signed_table(*_table_of(found, metric)))


def _calibration_part(found: Ensemble) -> str:
    if not any(row.calibration for row in found.rows):
        return ""
    words = (
        "On the test split, before and after temperature scaling. The temperature is fitted on "
        "validation, that of a fusion on its cross-fitted predictions."
    )
    return section("Calibration", note(words) + table(*_calibration(found), numbers=True))


def _parts(found: Ensemble) -> str:
    """What each fusion is, with its weights, and which members are in a soup."""
    rows = [
        (row.name, found.summaries.get(row.name) or _WHAT[row.kind], _content(found, row))
        for row in found.rows
    ]
    return table(("row", "what it is", "made of"), rows)


def _content(found: Ensemble, row: Row) -> str:
    weights = row.made_of.get("weights")
    if isinstance(weights, Sequence) and len(weights) == len(found.members):
        pairs = zip(found.members, weights, strict=True)
        return "; ".join(
            f"{weight:.3f} {member.name}" for member, weight in pairs if round(weight, 3)
        )
    members = row.made_of.get("members")
    if isinstance(members, Sequence):
        return "; ".join(map(str, members))
    return "all members" if row.kind == FUSION else str(row.made_of.get("folder", ""))
