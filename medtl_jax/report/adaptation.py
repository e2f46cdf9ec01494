"""Methods of domain adaptation: their table as Markdown, and one self-contained page.

Every method is trained on a labelled source and an unlabelled target with several seeds, its epoch
and then the method itself are chosen without target labels, and what is chosen is scored on the
target's test split. Two bounds stand beside them: training on the source alone, and training with
the target's labels.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Unpack

from matplotlib.figure import Figure

from medtl_jax.metrics.compare import lower_is_better
from medtl_jax.metrics.seeds import Estimate, Judged, Sampled, difference, judge, pick
from medtl_jax.report import study_page
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

# What a method is beside its name: one that is compared, or a bound.
ADAPTED, SOURCE_ONLY, SUPERVISED = "", "lower bound: source only", "upper bound: target labels"
ORACLE = "uses target labels; not used for any choice"


@dataclasses.dataclass(frozen=True)
class Method:
    """One method with all of its seeds.

    Attributes:
      name: of the method.
      folders: the run folder of each seed.
      values: of each validator, by its name, the value of each seed at the epoch that was kept;
        None where undefined. Those of the target-supervised bound are empty.
      test: the primary metrics on the target's test split; empty where it has no labels.
      against: the differences to source-only; empty of the two bounds.
      oracle: of each seed the best value of `Adaptation.oracle` that any of its epochs has on the
        target, which takes target labels to find; None where unknown.
      bound: `ADAPTED`, `SOURCE_ONLY` or `SUPERVISED`.
      statistics: which batch statistics the target's images meet, as `config.domain.bn`: `source`,
        `own` or `adabn`; `""` of the target-supervised bound.
      beyond: the differences to `Adaptation.statistics_alone`, of a method with a loss beside the
        same statistics; empty of the others.
    """

    name: str
    folders: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]]
    test: Mapping[str, Estimate]
    against: Mapping[str, Judged]
    oracle: tuple[float | None, ...] = ()
    bound: str = ADAPTED
    statistics: str = ""
    beyond: Mapping[str, Judged] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A validator, as a reader needs it: what it is, and whether more of it is better."""

    summary: str
    more_is_better: bool


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The result of methods x seeds on one target test split.

    Attributes:
      methods: source-only is among them; target-supervised may be.
      summaries: what each method is.
      source, target: names of the data sets.
      validators: by name; every one but `validator` is shown for comparison.
      validator: the one that chooses epoch and method.
      oracle: the metric of `Method.oracle`.
      seeds: how many.
      images, patients: of the target's test split, 0 images where it has no labels; patients None
        where they are not known.
      notes: what the runs and the data warned of.
      statistics_alone: the method that `Method.beyond` is measured from, `""` for none.

    Raises:
      ValueError: not one source-only; a validator that is not one of `validators`.
    """

    methods: tuple[Method, ...]
    summaries: Mapping[str, str]
    source: str
    target: str
    validators: Mapping[str, Criterion]
    validator: str
    oracle: str
    seeds: int
    images: int
    patients: int | None
    notes: tuple[str, ...] = ()
    statistics_alone: str = ""

    def __post_init__(self):
        if [method.bound for method in self.methods].count(SOURCE_ONLY) != 1:
            raise ValueError("want source-only among the methods, once")
        if self.validator not in self.validators:
            raise ValueError(f"{self.validator!r} is none of {', '.join(self.validators)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The primary metrics; none where the target has no labels."""
        return tuple(self.methods[0].test)

    @property
    def reference(self) -> str:
        """The name of source-only."""
        return next(method.name for method in self.methods if method.bound == SOURCE_ONLY)

    @property
    def candidates(self) -> tuple[Method, ...]:
        """The methods that may be picked: all that were trained without target labels."""
        return tuple(method for method in self.methods if method.bound != SUPERVISED)

    @property
    def picked(self) -> str:
        """The method that `validator` picks, `""` where it can pick none."""
        return self.picks[self.validator]

    @property
    def picks(self) -> dict[str, str]:
        """The method that each validator picks by its mean over the seeds, `""` for none."""
        return {
            name: pick(
                {method.name: method.values[name] for method in self.candidates},
                criterion.more_is_better,
            )
            for name, criterion in self.validators.items()
        }

    @property
    def best(self) -> str:
        """The method that target labels would pick, `""` where they are not known."""
        known = {method.name: method.oracle for method in self.candidates if method.oracle}
        return pick(known, not lower_is_better(self.oracle))


def compare_methods(
    samples: Mapping[str, Sequence[Sampled]], reference: str, bounds: Sequence[str] = ()
) -> dict[str, dict[str, Judged]]:
    """Returns the differences of the methods to `reference` with their verdicts, by method.

    Args:
      samples: of each method one for each seed, all on the same draws (`seeds.sample_runs`).
      reference: source-only.
      bounds: other methods without a verdict, such as the target-supervised one: it is no
        candidate, and Holm's correction is over the candidates alone.
    """
    return judge(
        {
            name: {
                metric: difference(found, samples[reference], metric) for metric in found[0].values
            }
            for name, found in samples.items()
            if name not in (reference, *bounds)
        }
    )


def to_json(found: Adaptation) -> dict:
    """Returns everything in `found` and its picks, ready for JSON; what is undefined is None."""
    return {**study_page.to_json(found), "picks": found.picks, "picked": found.picked}


def adaptation_table(found: Adaptation) -> str:
    """Returns the tables, the picks and how to read them, as Markdown."""
    tables = [_table_of(found, metric) for metric in found.metrics]
    tables += ["Validators:", _validator_table(found)]
    verdicts = [printable(line) for line in picks(found)]
    return markdown_page(verdicts, tables, reading(found), found.notes, noted="Notes")


def picks(found: Adaptation) -> list[str]:
    """Returns what each validator picks, and of the one in use the target's test, a line each.

    What another one picks has no score here: it would have chosen other epochs too.
    """
    lines = []
    for name, method in found.picks.items():
        use = " (in use)" if name == found.validator else ""
        if not method:
            lines.append(f"{name}{use}: no method has a value for every seed")
        elif use:
            lines.append(f"{name}{use} picks {method}{_scores(found, method)}")
        else:
            lines.append(f"{name} would pick {method} at the epochs chosen by {found.validator}")
    # What chooses comes first.
    lines.sort(key=lambda line: not line.startswith(f"{found.validator} (in use)"))
    if found.best:
        lines.append(f"oracle ({ORACLE}) would pick {found.best} at its own best epochs")
    return lines


def _scores(found: Adaptation, name: str) -> str:
    """`; target test AUC 0.9 (0.8 to 1.0)` of a method; nothing of a target without labels."""
    test = next(method.test for method in found.methods if method.name == name)
    return f"; target test {scores_text(test)}" if test else ""


def reading(found: Adaptation) -> list[str]:
    """Returns what one has to know to read the tables, a line each."""
    source, target = printable(found.source), printable(found.target)
    seeds = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
    criterion = found.validators[found.validator]
    lines = [
        f"Labels: those of the source {source} alone. The target {target} is seen without labels "
        "by every method but the upper bound.",
        f"Chosen by {found.validator} ({criterion.summary}, {_better(criterion)}): the epoch of "
        "each run, and the method by its mean over the seeds. A method that minimises what a "
        "validator measures has a good value of it whether or not its classes are right.",
        f"Oracle ({ORACLE}): the best {label_of(found.oracle)} of any epoch on the target, the "
        "mean over the seeds.",
        *_reading_of_statistics(found),
    ]
    if not found.images:
        return [*lines, "The target's test split has no labels: there are no target scores."]
    size = size_text(found.images, found.patients)
    covered = f"other test {unit_of(found.patients)}"
    covered += " and other seeds" if found.seeds > 1 else " only"
    return [
        *lines,
        f"Test split of the target: {size}, the same for every run; means over {seeds}. The 95 % "
        f"intervals cover {covered}; sd is the standard deviation over the seeds.",
        f"A difference is the method minus {found.reference}, paired by seed and by test image. "
        "Its verdict takes a p of at most 0.05 after Holm's correction over all methods and "
        "metrics; “cannot tell” is not “equal”.",
    ]


def _reading_of_statistics(found: Adaptation) -> list[str]:
    """Which statistics the target's images meet in batch norms, where they are not all the same."""
    rows: dict[str, list[str]] = {}
    for method in found.candidates:
        rows.setdefault(method.statistics, []).append(method.name)
    if len(rows) < 2:
        return []
    parts = [f"{kind} in {', '.join(names)}" for kind, names in rows.items()]
    line = f"Batch statistics that the target meets (domain.bn): {'; '.join(parts)}."
    if not found.images:
        return [line]
    line += f" A verdict against {found.reference} is on these and on losses together"
    if found.statistics_alone:
        line += f", one against {found.statistics_alone}, with Holm's correction anew, on losses"
    return [f"{line}."]


def _better(criterion: Criterion) -> str:
    return "higher is better" if criterion.more_is_better else "lower is better"


def _name(found: Adaptation, method: Method) -> str:
    """A method's name with what one has to know of it."""
    words = [method.bound] if method.bound else []
    words += ["picked"] if method.name == found.picked else []
    return method.name + (f" ({'; '.join(words)})" if words else "")


def _table_of(found: Adaptation, metric: str) -> Cells:
    """Head and rows of one metric on the target's test split, all of them text."""
    head = ["method", f"target {label_of(metric)} (95 % CI)", "verdict"]
    head += [f"minus {found.reference} (95 % CI)"]
    head += [f"verdict against {found.statistics_alone}"] * bool(found.statistics_alone)
    head += ["sd", found.validator]
    # A metric that is no primary one stands by the first of them.
    oracle = metric == (found.oracle if found.oracle in found.metrics else found.metrics[0])
    head += [f"oracle {label_of(found.oracle)}: {ORACLE}"] * oracle
    rows = []
    for method in found.methods:
        value, judged = method.test[metric], method.against.get(metric)
        row = [_name(found, method), with_interval(entry_of(value))]
        row += [judged.verdict, with_interval(entry_of(judged.estimate))] if judged else ["", ""]
        if found.statistics_alone:
            row.append(method.beyond[metric].verdict if metric in method.beyond else "")
        row += [spread_text(value.spread), mean_text(method.values.get(found.validator, ()))]
        rows.append(row + [mean_text(method.oracle)] * oracle)
    return head, rows


def _validator_table(found: Adaptation) -> Cells:
    """Head and rows: the mean of each validator for each method, the best one marked."""
    chosen = found.picks
    head = ["method"]
    for name, criterion in found.validators.items():
        use = ", in use" if name == found.validator else ""
        head.append(f"{name} ({_better(criterion)}{use})")
    rows = []
    for method in found.candidates:
        row = [_name(found, method)]
        for name in found.validators:
            best = " (best)" if chosen[name] == method.name else ""
            row.append(mean_text(method.values[name]) + best)
        rows.append(row)
    return head, rows


def write_adaptation(
    path: pathlib.Path,
    *,
    found: Adaptation,
    figures: Mapping[str, Figure],
    **study: Unpack[Study],
) -> None:
    """Writes the page to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file.
      found: what was found.
      figures: see `adaptation_figures`.
      study: title, commands, configuration and environment.

    Raises:
      UserError: the file cannot be written.
    """
    scores = "".join(_metric_part(found, metric) for metric in found.metrics)
    kinds = [(name, what.summary, _better(what)) for name, what in found.validators.items()]
    sections = [
        section("Which method", bullets(picks(found))),
        section("All methods", scores or "<p>The target's test split has no labels.</p>"),
        side_by_side(list(pictures(figures).values())),
        section("Validators", signed_table(*_validator_table(found))),
        table(("validator", "what it is", "direction"), kinds),
        section("How to read it", bullets(reading(found))),
        section("The methods", table(("method", "what it is"), list(found.summaries.items()))),
        notes_section(found.notes, "Notes"),
    ]
    write_study(path, sections, **study)


def _metric_part(found: Adaptation, metric: str) -> str:
    return subsection(label_of(metric), signed_table(*_table_of(found, metric)))
