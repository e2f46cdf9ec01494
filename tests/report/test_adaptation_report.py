"""The table, the page and the figures of an adaptation."""

import dataclasses
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.seeds import Estimate, Judged, difference, judge, sample_runs
from medtl_jax.report.adaptation import (
    ORACLE,
    SOURCE_ONLY,
    SUPERVISED,
    Adaptation,
    Criterion,
    Method,
    adaptation_table,
    compare_methods,
    picks,
    to_json,
    write_adaptation,
)
from medtl_jax.report.adaptation_figures import (
    MOST_POINTS,
    Features,
    discriminator_figure,
    embed,
    features_figure,
    methods_figure,
)
from medtl_jax.report.style import BLUE, RED, encode_png

TEST = {"source_only": 0.7, "dann": 0.9, "cdan": 0.8, "supervised": 0.98}
# By the source's validation nothing beats training on the source, by SND it is CDAN, and DANN is
# what target labels would choose.
SOURCE = {"source_only": 0.99, "dann": 0.95, "cdan": 0.96}
SND = {"source_only": 4.0, "dann": 5.0, "cdan": 6.0}
BOUNDS = {"source_only": SOURCE_ONLY, "supervised": SUPERVISED}


def estimate(value: float, half: float = 0.02) -> Estimate:
    ends = (value - half, value + half)
    return Estimate(value, (value, value), 0.01, ends, ends, ends, 0.5)


def method(name: str) -> Method:
    bound, value = BOUNDS.get(name, ""), TEST[name]
    gap = Judged(estimate(value - 0.7), 0.04, "better" if name == "dann" else "cannot tell")
    return Method(
        name,
        (f"cells/{name}-0", f"cells/{name}-1"),
        {} if bound == SUPERVISED else {"source": (SOURCE[name],) * 2, "snd": (SND[name],) * 2},
        {"auc": estimate(value), "accuracy": estimate(value - 0.1)},
        {} if bound else {"auc": gap, "accuracy": gap},
        () if bound == SUPERVISED else (value - 0.1, value),
        bound,
    )


def adaptation(**changes) -> Adaptation:
    found = Adaptation(
        methods=tuple(map(method, TEST)),
        summaries={name: f"what <{name}> is" for name in TEST},
        source="children",
        target="adults",
        validators={
            "source": Criterion("accuracy on the source's validation split", True),
            "snd": Criterion("density", True),
        },
        validator="snd",
        oracle="accuracy",
        seeds=2,
        images=500,
        patients=None,
    )
    return dataclasses.replace(found, **changes)


def without_labels() -> Adaptation:
    methods = [dataclasses.replace(method(n), test={}, against={}, oracle=()) for n in TEST]
    return adaptation(methods=tuple(methods[:3]), images=0)


def tables_of(words: str) -> list[list[list[str]]]:
    """The cells of every table, with its head and without the rule below."""
    tables: list[list[list[str]]] = [[]]
    for line in words.splitlines():
        if line.startswith("| "):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [[rows[0], *rows[2:]] for rows in tables if rows]


def test_the_table_says_values_differences_verdicts_and_bounds():
    auc, accuracy, validators = tables_of(adaptation_table(adaptation()))
    assert auc[0] == [
        "method", "target AUC (95 % CI)", "verdict", "minus source_only (95 % CI)", "sd", "snd",
    ]  # fmt: skip
    assert auc[1] == [
        "source_only (lower bound: source only)", "0.7000 (0.6800 to 0.7200)", "", "", "0.0100",
        "4.0000",
    ]  # fmt: skip
    assert auc[2] == [
        "dann", "0.9000 (0.8800 to 0.9200)", "better", "0.2000 (0.1800 to 0.2200)", "0.0100",
        "5.0000",
    ]  # fmt: skip
    assert auc[3][0] == "cdan (picked)"
    assert auc[4] == [
        "supervised (upper bound: target labels)", "0.9800 (0.9600 to 1.0000)", "", "", "0.0100",
        "",
    ]  # fmt: skip
    assert [row[0] for row in validators[1:]] == [row[0] for row in auc[1:4]]
    assert accuracy[0][-1] == f"oracle accuracy: {ORACLE}"
    # The mean of 0.8 and 0.9.
    assert accuracy[2][-1] == "0.8500" and accuracy[4][-1] == ""


def with_statistics(**kinds) -> list[Method]:
    return [dataclasses.replace(method(n), statistics=kinds.get(n, "")) for n in TEST]


def test_a_loss_beside_statistics_of_its_own_is_held_against_these_alone():
    """DANN beside `cdan`, which stands for batch norms of each domain's own here."""
    methods = with_statistics(source_only="source", dann="own", cdan="own")
    beyond = {"auc": Judged(estimate(-0.1), 0.01, "worse")}
    methods[1] = dataclasses.replace(methods[1], beyond=beyond)
    found = adaptation(methods=tuple(methods), statistics_alone="cdan")
    words = adaptation_table(found)
    auc, accuracy, _ = tables_of(words)
    assert auc[0][3:6] == ["minus source_only (95 % CI)", "verdict against cdan", "sd"]
    assert [row[4] for row in auc[1:]] == ["", "worse", "", ""]
    # What was not compared has no verdict, that against source-only stays.
    assert [row[4] for row in accuracy[1:]] == ["", "", "", ""]
    assert auc[2][2] == "better" and auc[2][5] == "0.0100"
    assert (
        "- Batch statistics that the target meets (domain.bn): source in source_only; own in dann, "
        "cdan. A verdict against source_only is on these and on losses together, one against cdan, "
        "with Holm's correction anew, on losses.\n"
    ) in words


def test_statistics_are_told_of_where_they_differ():
    alike = adaptation(methods=tuple(with_statistics(source_only="source", dann="source")[:2]))
    assert "Batch statistics" not in adaptation_table(alike)
    methods = with_statistics(source_only="source", dann="adabn", cdan="source")
    words = adaptation_table(adaptation(methods=tuple(methods)))
    assert "source in source_only, cdan; adabn in dann. A verdict against source_only is" in words
    assert "on losses together.\n" in words and "verdict against cdan" not in words
    bare = [dataclasses.replace(m, test={}, against={}) for m in methods[:3]]
    words = adaptation_table(adaptation(methods=tuple(bare), images=0))
    assert "adabn in dann.\n" in words and "A verdict" not in words


def test_the_oracle_stands_in_one_column_and_in_no_choice():
    words = adaptation_table(adaptation())
    assert ORACLE == "uses target labels; not used for any choice"
    auc, accuracy, _ = tables_of(words)
    assert not any("oracle" in cell for cell in auc[0])
    assert sum("oracle" in cell for cell in accuracy[0]) == 1
    assert words.count(ORACLE) == 3
    # Whatever the target's labels say, the pick is the same.
    for seeds in ((0.1, 0.1), (1.0, 1.0), (None, None), ()):
        methods = [dataclasses.replace(one, oracle=seeds) for one in map(method, TEST)]
        found = adaptation(methods=tuple(methods))
        assert found.picked == "cdan" and found.picks == {"source": "source_only", "snd": "cdan"}
    reversed_test = [
        dataclasses.replace(one, test={k: estimate(1 - v.value) for k, v in one.test.items()})
        for one in map(method, TEST)
    ]
    assert adaptation(methods=tuple(reversed_test)).picked == "cdan"


def test_an_oracle_of_another_metric_stands_by_the_first():
    auc, accuracy, _ = tables_of(adaptation_table(adaptation(oracle="quadratic_kappa")))
    assert auc[0][-1] == f"oracle quadratic kappa: {ORACLE}" and auc[2][-1] == "0.8500"
    assert "oracle" not in accuracy[0][-1]


def test_what_chooses_is_said_first_and_what_target_labels_would_choose_last():
    lines = picks(adaptation())
    assert lines[0].startswith("snd (in use) picks cdan; target test AUC 0.8000 (0.7800 to 0.82")
    # No score stands behind these: the epochs would have been others.
    assert lines[1] == "source would pick source_only at the epochs chosen by snd"
    assert lines[2] == f"oracle ({ORACLE}) would pick dann at its own best epochs"
    assert len(lines) == 3


def test_the_bound_with_target_labels_is_never_picked():
    values = {"source": (1.0, 1.0), "snd": (99.0, 99.0)}
    methods = [method(name) for name in TEST]
    methods[3] = dataclasses.replace(methods[3], values=values, oracle=(1.0, 1.0))
    found = adaptation(methods=tuple(methods))
    assert found.picked == "cdan" and found.best == "dann"


def test_the_direction_of_a_validator_counts():
    lower = {"source": Criterion("loss", False), "snd": Criterion("entropy", False)}
    found = adaptation(validators=lower)
    assert found.picks == {"source": "dann", "snd": "source_only"}
    head, *rows = tables_of(adaptation_table(found))[2]
    assert head[1:] == ["source (lower is better)", "snd (lower is better, in use)"]
    best = [[cell.endswith("(best)") for cell in row[1:]] for row in rows]
    assert best == [[False, True], [True, False], [False, False]]


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_seed_without_a_value_keeps_a_method_from_being_picked(value):
    methods = [
        dataclasses.replace(one, values={**one.values, "snd": (9.0, value)})
        if one.name == "cdan"
        else one
        for one in map(method, TEST)
    ]
    found = adaptation(methods=tuple(methods))
    assert found.picked == "dann"
    cdan = next(row for row in tables_of(adaptation_table(found))[2] if row[0] == "cdan")
    assert cdan[2] == "undefined"
    nobody = [
        dataclasses.replace(one, values={"source": (0.5,), "snd": (value,)}) for one in methods
    ]
    found = adaptation(methods=tuple(nobody))
    assert found.picked == "" and "snd (in use): no method has a value" in picks(found)[0]


def test_a_target_without_labels_has_validators_and_no_scores():
    found = without_labels()
    words = adaptation_table(found)
    (validators,) = tables_of(words)
    assert [row[0] for row in validators[2:]] == ["dann", "cdan (picked)"]
    assert "there are no target scores" in words and "target test" not in words
    assert picks(found) == [
        "snd (in use) picks cdan", "source would pick source_only at the epochs chosen by snd",
    ]  # fmt: skip
    assert found.metrics == () and found.best == ""


def test_what_the_intervals_cover_is_said():
    words = adaptation_table(adaptation(patients=300, notes=("one | two",)))
    assert "500 images of 300 patients" in words and "other test patients and other seeds" in words
    assert words.endswith("Notes:\n\n- one | two\n")
    assert "other test images only" in adaptation_table(adaptation(seeds=1))


def test_a_result_without_its_reference_is_refused():
    with pytest.raises(ValueError, match="source-only"):
        adaptation(methods=(method("dann"),))
    with pytest.raises(ValueError, match="'entropy' is none of source, snd"):
        adaptation(validator="entropy")


def test_the_bound_is_no_part_of_holms_family():
    rng = np.random.default_rng(0)
    target = np.arange(80) % 2
    ids = np.array([str(i) for i in range(80)])

    def runs(strength: float):
        for _ in range(2):
            logit = strength * (2 * target - 1) + rng.normal(size=80)
            score = 1 / (1 + np.exp(-np.stack([-logit, logit], axis=1)))
            yield Predicted("run", "classify", ("a", "b"), ids, target, score)

    strengths = {"source_only": 0.3, "dann": 0.8, "cdan": 1.2, "supervised": 2.0}
    every = (run for strength in strengths.values() for run in runs(strength))
    drawn = sample_runs(every, resamples=200)
    samples = {name: [next(drawn), next(drawn)] for name in strengths}
    found = compare_methods(samples, "source_only", ["supervised"])
    assert list(found) == ["dann", "cdan"]
    wanted = judge(
        {
            name: {
                m: difference(samples[name], samples["source_only"], m) for m in ("auc", "accuracy")
            }
            for name in ("dann", "cdan")
        }
    )
    assert found == wanted
    least = min(one.estimate.p for metrics in found.values() for one in metrics.values())
    adjusted = [one.adjusted for metrics in found.values() for one in metrics.values()]
    assert min(adjusted) == pytest.approx(4 * least)


def test_everything_is_ready_for_json():
    none = Estimate(math.nan, (math.nan,), math.nan, reason="undefined on the test split")
    methods = [method(name) for name in TEST]
    methods[1] = dataclasses.replace(methods[1], test={"auc": none, "accuracy": none})
    parsed = json.loads(json.dumps(to_json(adaptation(methods=tuple(methods))), allow_nan=False))
    assert parsed["picked"] == "cdan" and parsed["picks"]["source"] == "source_only"
    assert parsed["methods"][1]["test"]["auc"]["value"] is None
    assert parsed["methods"][2]["values"]["snd"] == [6.0, 6.0]


def test_the_page_is_whole_and_safe(tmp_path):
    found = adaptation(source="<children>")
    path = tmp_path / "report.html"
    content = {
        "found": found,
        "title": "Adaptation: <script>",
        "command": "python launch.py <b>",
        "config": {"seed": 0},
        "environment": {"backend": "cpu"},
        "commands": {"dann-0": "python launch.py --config.seed=0"},
        "figures": {"methods": methods_figure(found, "auc")},
    }
    write_adaptation(path, **content)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "launch.py <b>" not in page and "<children>" not in page
    assert "Batch statistics" not in page
    assert "what &lt;dann&gt; is" in page and "▲ better" in page and "dann-0" in page
    assert ORACLE in page and page.count("<img") == 1
    first = path.read_bytes()
    # Drawing a figure moves its parts a little: the same figure means one made anew.
    write_adaptation(path, **{**content, "figures": {"methods": methods_figure(found, "auc")}})
    assert path.read_bytes() == first
    methods = with_statistics(source_only="source", dann="own", cdan="own")
    beyond = {"auc": Judged(estimate(-0.1), 0.01, "worse")}
    methods[1] = dataclasses.replace(methods[1], beyond=beyond)
    both = adaptation(methods=tuple(methods), statistics_alone="cdan")
    write_adaptation(path, **{**content, "found": both, "figures": {}})
    page = path.read_text(encoding="utf-8")
    assert "verdict against cdan" in page and page.count("▼ worse") == 1
    assert "domain.bn): source in source_only; own in dann, cdan." in page
    write_adaptation(path, **{**content, "found": without_labels(), "figures": {}})
    assert "has no labels" in path.read_text(encoding="utf-8")


def test_methods_stand_between_their_bounds():
    figure = methods_figure(adaptation(), "auc")
    encode_png(figure)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(TEST)
    lines = {
        line.get_linestyle(): line.get_xdata()[0]
        for line in axes.lines
        if line.get_linestyle() in ("--", ":")
    }
    assert lines == {"--": 0.7, ":": 0.98}
    (ring,) = (line for line in axes.lines if line.get_markersize() == 11)
    np.testing.assert_allclose(ring.get_xydata(), [[0.8, 2]])
    squares = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "s"]
    assert squares == [0.7, 0.98]


def test_pca_keeps_distances_in_a_plane():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(40, 2)) * (3, 1)
    turned = plane @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:2] + 5
    flat = embed(turned)

    def distances(points):
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    np.testing.assert_allclose(distances(flat), distances(plane), atol=1e-9)
    assert flat[:, 0].var() > flat[:, 1].var()
    line = embed(np.arange(8.0)[:, None])
    np.testing.assert_allclose(np.abs(np.diff(line[:, 0])), 1)
    np.testing.assert_allclose(line[:, 1], 0, atol=1e-12)


def test_tsne_keeps_clusters_and_is_the_same_twice():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(20, 60)), rng.normal(12, 1, (20, 60))])
    flat = embed(features, "tsne", 3)
    np.testing.assert_array_equal(flat, embed(features, "tsne", 3))
    centres = flat[:20].mean(axis=0), flat[20:].mean(axis=0)
    nearest = np.argmin([np.linalg.norm(flat - centre, axis=1) for centre in centres], axis=0)
    np.testing.assert_array_equal(nearest, np.repeat([0, 1], 20))
    assert np.isfinite(embed(np.ones((6, 4)), "tsne")).all(), "features that are all the same"


@pytest.mark.parametrize(
    ("features", "kind"),
    [(np.ones((4, 3)), "pca"), (np.full((9, 3), np.nan), "pca"), (np.ones((9, 3)), "umap")],
)
def test_what_cannot_be_embedded_is_refused(features, kind):
    with pytest.raises(ValueError, match="want one of"):
        embed(features, kind)


def panel(labelled: bool = True, n: int = 30, m: int = 40) -> Features:
    rng = np.random.default_rng(0)
    labels, other = np.arange(n) % 2, np.arange(m) % 2
    centres = np.array([[0, 0, 0], [9, 0, 0]])
    target = centres[other] + (0, 5, 0) + rng.normal(size=(m, 3))
    source = centres[labels] + rng.normal(size=(n, 3))
    return Features(source, target, labels, other if labelled else None)


def lines_of(figure: Figure) -> list:
    return [line for axes in figure.axes for line in axes.lines]


def test_colour_is_the_domain_and_the_marker_the_class():
    figure = features_figure({"before": panel(), "after": panel(), "third": panel()}, ("a", "b"))
    encode_png(figure)
    first = figure.axes[0]
    found = {(line.get_color(), line.get_marker()): len(line.get_xdata()) for line in first.lines}
    assert found == {(BLUE, "o"): 15, (BLUE, "s"): 15, (RED, "o"): 20, (RED, "s"): 20}
    names = [(note.get_text(), note.get_color()) for note in first.texts]
    assert names == [("a", BLUE), ("b", BLUE), ("a", RED), ("b", RED)]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["before", "after", "third", ""]
    assert "labels that nothing was trained or chosen by" in figure.get_label()


def test_a_target_without_labels_has_dots():
    figure = features_figure({"dann": panel(labelled=False)}, ("a", "b"))
    encode_png(figure)
    orange = [line for line in lines_of(figure) if line.get_color() == RED]
    assert [(line.get_marker(), len(line.get_xdata())) for line in orange] == [(".", 40)]
    assert len(figure.axes[0].texts) == 2


def test_images_without_a_class_are_dots_without_a_word_on_classes():
    bare = dataclasses.replace(panel(labelled=False), source_labels=None)
    figure = features_figure({"dann": bare}, ())
    encode_png(figure)
    found = {
        (line.get_color(), line.get_marker()): len(line.get_xdata()) for line in lines_of(figure)
    }
    assert found == {(BLUE, "."): 30, (RED, "."): 40}
    assert "classes" not in figure.get_label() and not figure.axes[0].texts


def test_many_images_are_thinned():
    many = panel(n=MOST_POINTS + 50, m=20)
    figure = features_figure({"dann": many}, ("a", "b"))
    points = {BLUE: 0, RED: 0}
    for line in lines_of(figure):
        points[line.get_color()] += len(line.get_xdata())
    assert points == {BLUE: MOST_POINTS, RED: 20}


def test_the_discriminators_accuracy_has_its_chance_line():
    runs = {"dann": [[0.9, 0.7, 0.5], [1.0, 0.9, None]], "cdan": [[0.8, 0.6, 0.7]] * 2}
    figure = discriminator_figure(runs, chance=0.75)
    encode_png(figure)
    (axes,) = figure.axes
    dann, cdan, chance = axes.lines
    np.testing.assert_allclose(dann.get_ydata(), [0.95, 0.8, math.nan])
    np.testing.assert_allclose(cdan.get_ydata(), [0.8, 0.6, 0.7])
    assert set(chance.get_ydata()) == {0.75} and chance.get_label() == "chance (0.75)"
    assert axes.get_xticks().tolist() and axes.get_ylim()[0] <= 0.6
    band = axes.collections[0].get_paths()[0].vertices
    assert {0.9, 1.0, 0.7} <= set(np.round(band[:, 1], 6))


def test_epochs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one method"):
        discriminator_figure({})
    with pytest.raises(ValueError, match="different numbers"):
        discriminator_figure({"dann": [[0.9, 0.7], [0.8]]})
