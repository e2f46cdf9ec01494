import dataclasses
import math

import numpy as np
import pytest
from report_tasks import CLASSES, epochs, probabilities, view

from medtl_jax.metrics.calibration import reliability
from medtl_jax.metrics.scores import confusion
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report.classification import (
    choose_finding_errors,
    choose_found_findings,
    choose_right,
    choose_wrong,
    confusion_figure,
    examples_figure,
    finding_errors_figure,
)
from medtl_jax.report.curves import class_bars_figure, curves_figure, metrics_figure
from medtl_jax.report.explanations import choose_cases as choose_explained
from medtl_jax.report.explanations import gradcam_figure
from medtl_jax.report.figures import draw_figures
from medtl_jax.report.rates import precision_recall_figure, reliability_figure, roc_figure
from medtl_jax.report.regression import (
    agreement_figure,
    choose_closest,
    choose_number_errors,
    number_errors_figure,
    predicted_figure,
    residuals_figure,
)
from medtl_jax.report.segmentation import (
    choose_cases,
    dice_figure,
    observer_dice,
    overlay_figure,
)
from medtl_jax.report.style import WIDTH, encode_png

NAMES = {
    "classify": {"confusion", "roc", "pr", "reliability", "examples", "errors", "gradcam"},
    "ordinal": {"confusion", "roc", "pr", "reliability", "examples", "errors", "gradcam"},
    "multilabel": {"auc", "roc", "pr", "reliability", "errors", "gradcam"},
    "segment": {
        *("dice", "confusion", "reliability"),
        *("overlay_best", "overlay_median", "overlay_worst"),
    },
    "regress": {"predicted", "agreement", "residuals", "errors", "gradcam"},
}


def legend(figure):
    boxes = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for box in boxes if box for text in box.get_texts()]


def titles(figure):
    return [axes.get_title("left") for axes in figure.axes]


def written(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("task", CLASSES)
def test_every_task_has_its_figures_narrow_enough_for_a_phone(task):
    figures = draw_figures(task, view(task))
    assert set(figures) == NAMES[task] | {"metrics", "curves"}
    for name, figure in figures.items():
        assert figure.get_label(), name
        assert figure.get_figwidth() <= WIDTH, name


def test_confusion_shows_counts_and_shares():
    target, score = probabilities(50, 2, 1)
    counts = confusion(target, score)
    texts = written(confusion_figure(counts, ("no", "yes")).axes[0])
    assert texts[1] == f"{counts[0, 1]}\n{counts[0, 1] / counts[0].sum():.1%}"
    pixels = np.array([[12_345_678, 0], [15_000, 999]])
    texts = written(confusion_figure(pixels, ("no", "yes"), "pixel").axes[0])
    assert [text.split("\n")[0] for text in texts] == ["12.35 M", "0", "15 k", "999"]


def test_roc_and_precision_recall_curves_have_the_areas_of_the_metrics():
    target, score = probabilities(50, 2, 1)
    metrics = score_with_intervals("classify", target, score, ("no", "yes"), resamples=20)
    metrics |= {
        f"{metric}@youden": {"value": value, "ci95": None, "n": 50}
        for metric, value in (("recall", 0.875), ("specificity", 0.75), ("precision", 0.625))
    }
    roc = roc_figure(target, score, ("no", "yes"), metrics)
    x, y = roc.axes[0].get_lines()[1].get_data()
    assert np.trapezoid(y, x) == pytest.approx(metrics["auc"]["value"], abs=1e-12)
    assert legend(roc)[0].startswith(f"yes: {metrics['auc']['value']:.4f} (")
    curve = precision_recall_figure(target, score, ("no", "yes"), metrics)
    prevalence, line, youden = curve.axes[0].get_lines()
    recall, precision = line.get_data()
    # Average precision is the sum of precision times the step of recall.
    area = -np.sum(np.diff(recall) * precision[:-1])
    assert area == pytest.approx(metrics["pr_auc"]["value"], abs=1e-12)
    np.testing.assert_allclose(prevalence.get_ydata(), target.mean())
    assert [youden.get_xdata()[0], youden.get_ydata()[0]] == [0.875, 0.625]
    (mark,) = [line for line in roc.axes[0].get_lines() if line.get_label() == "Youden"]
    assert [mark.get_xdata()[0], mark.get_ydata()[0]] == [0.25, 0.875]


def test_curves_of_findings_leave_unknown_labels_out():
    target = np.array([[1], [0], [-1], [1], [0]], np.int8)
    score = np.array([[0.9], [0.1], [0.95], [0.3], [0.4]])
    metrics = {"auc/mass": {"value": 0.75, "ci95": None, "n": 4}}
    line = roc_figure(target, score, ("mass",), metrics).axes[0].get_lines()[1]
    # Positives 0.9, 0.3; negatives 0.4, 0.1: three of four pairs are in order.
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == 0.75


def test_a_class_without_images_is_named_not_drawn():
    target = np.array([0, 1] * 20)
    score = np.tile([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], (20, 1))
    classes = ("no", "yes", "rare")
    metrics = score_with_intervals("classify", target, score, classes, resamples=20)
    assert legend(roc_figure(target, score, classes, metrics))[-1] == "rare: undefined"


@pytest.mark.parametrize(("k", "panels"), [(7, 1), (8, 8), (30, 1)])
def test_many_curves_get_panels_and_very_many_a_summary(k, panels):
    names = [f"class with a long name {i}" for i in range(k)]
    target, score = probabilities(20 * k, k)
    metrics = {f"auc/{name}": {"value": 0.5, "ci95": None, "n": 1} for name in names}
    figure = roc_figure(target, score, names, metrics)
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == panels
    assert encode_png(figure, 30)
    # Names cut to the same beginning stay distinct.
    labels = [axes.get_title("left") for axes in shown] if panels > 1 else legend(figure)
    assert len(set(labels)) == len(labels) == min(k, 8)
    if k == 30:
        assert labels[-1] == "23 classes of higher AUC"


def test_confusion_of_many_classes_can_be_drawn():
    names = [f"class with a long name {i}" for i in range(30)]
    figure = confusion_figure(np.eye(30, dtype=int), names)
    assert encode_png(figure, 30) and not figure.axes[0].texts


def test_reliability_before_and_after():
    target = np.array([1, 0, 1, 1])
    # Bins of 1/15: 0.5 is in the eighth (0.4667, 0.5333], 0.9 in the fourteenth (0.8667, 0.9333].
    before, after = (
        reliability(target, np.array(score)) for score in ([0.5, 0.5, 0.9, 0.9], [0.9] * 4)
    )
    upper, lower = reliability_figure(before, after).axes
    _, first, second = upper.get_lines()
    np.testing.assert_allclose(first.get_xydata(), [[0.5, 0.5], [0.9, 1.0]])
    np.testing.assert_allclose(second.get_xydata(), [[0.9, 0.75]])
    counts = [patch.get_data().values.tolist() for patch in lower.patches]
    assert counts[0] == [0] * 7 + [2] + [0] * 5 + [2, 0] and counts[1][13] == 4
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        "perfect", "before scaling", "after temperature scaling",
    ]  # fmt: skip
    alone = reliability_figure(before).axes[0].get_legend().get_texts()[1].get_text()
    assert alone == "as predicted"


def test_training_curves_take_any_validation_metric():
    figure = curves_figure(epochs())
    assert titles(figure) == [
        "training loss", "validation loss", "validation metrics", "validation MAE", "learning rate",
    ]  # fmt: skip
    loss, validation, scores, mae, rates = figure.axes
    np.testing.assert_array_equal(loss.get_lines()[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_array_equal(validation.get_lines()[0].get_ydata(), [0.9] * 4)
    assert "log loss" in figure.get_label() and "minimised" in figure.get_label()
    assert np.isnan(scores.get_lines()[1].get_ydata()[0])
    np.testing.assert_array_equal(mae.get_lines()[0].get_ydata(), [4, 3, 2, 1])
    assert rates.get_yscale() == "log"
    # The last epoch called best is the one kept.
    assert "kept: epoch 3" in legend(figure)
    with pytest.raises(ValueError, match="at least one epoch"):
        curves_figure([])


def test_bars_show_only_metrics_that_end_at_one():
    metrics = {
        "accuracy": {"value": 0.75, "ci95": [0.5, 0.875], "n": 8},
        "f1": {"value": None, "ci95": None, "n": 8},
        "r2": {"value": -0.5, "ci95": [-3.0, 0.25], "n": 8},
        "mae": {"value": 12.5, "ci95": [10.0, 15.0], "n": 8},
        "ece_calibrated": {"value": 0.1, "ci95": None, "n": 8},
        "accuracy/a": {"value": 0.1, "ci95": None, "n": 8},
        "recall@youden": {"value": 0.1, "ci95": None, "n": 8},
    }
    axes = metrics_figure(metrics).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0, -0.5]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[0.5, 0.875], [-3.0, 0.25]]
    # A far end of an interval does not flatten the other bars.
    assert axes.get_xlim() == (-1.05, 1)
    assert "0.7500 (0.5000 to 0.8750)" in written(axes) and "undefined" in written(axes)
    assert metrics_figure({"mae": metrics["mae"]}) is None


def test_bars_of_findings_are_sorted_and_counted():
    metrics = {
        f"auc/{name}": {"value": value, "ci95": None, "n": 9}
        for name, value in (("a", 0.5), ("b", None), ("c", 0.75))
    }
    axes = class_bars_figure(metrics, "auc", ("a", "b", "c"), (4, 0, 5)).axes[0]
    assert written(axes)[::2] == ["c (n = 5)", "a (n = 4)", "b (n = 0)"]


def test_examples_are_taken_in_turn_and_errors_the_surest_first():
    # Class 0: images 0-3 right; class 1: 4-5 right; 6 and 7 wrong, 7 more surely.
    target = np.array([0, 0, 0, 0, 1, 1, 0, 1])
    one = np.array([0.1, 0.3, 0.2, 0.4, 0.7, 0.6, 0.8, 0.05])
    score = np.stack([1 - one, one], axis=1)
    assert choose_right(target, score, 3).tolist() == [0, 4, 2]
    assert choose_right(target, score).tolist() == [0, 4, 2, 5, 1, 3]
    assert choose_wrong(target, score).tolist() == [7, 6]
    assert choose_wrong(target, score, 1).tolist() == [7]
    with pytest.raises(ValueError, match="1 to 6"):
        examples_figure(np.zeros((7, 8, 8, 1), np.uint8), target, score, ("a", "b"), [])


def test_wrong_examples_are_marked_in_words_and_frame():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    score = np.array([[0.9, 0.1], [0.75, 0.25]])
    figure = examples_figure(images, np.array([0, 1]), score, ("a$b", "c"), ["i/1", "i/2"])
    right, wrong = figure.axes
    assert titles(figure) == ["right: a\\$b 0.90\ntruth: a\\$b", "wrong: a\\$b 0.75\ntruth: c"]
    assert wrong.spines["left"].get_linewidth() > right.spines["left"].get_linewidth()
    assert encode_png(figure, 30)


def test_errors_of_findings_are_of_different_images_and_known_labels():
    target = np.array([[1, 0], [0, -1], [1, 1], [0, 0]], np.int8)
    score = np.array([[0.25, 0.125], [0.375, 1.0], [0.0625, 0.1875], [0.875, 0.75]])
    # Ranks of mass: 3/8, 5/8, 1/8, 7/8; of nodule: 1/6, unknown, 3/6, 5/6. At a threshold of 0.5
    # image 0 misses a mass by 5/8 and 2 by 7/8 (its nodule by 3/6); 3 is a false alarm by 7/8.
    half = np.array([0.5, 0.5])
    assert choose_finding_errors(target, score, half).tolist() == [[2, 0], [3, 0], [0, 0]]
    images, ids = np.zeros((4, 8, 8, 1), np.uint8), np.array(list("abcd"))
    figure = finding_errors_figure(images, target, score, ("mass", "nodule"), ids, half)
    assert titles(figure)[:3] == [
        "missed: 0.06\nmass",
        "false alarm: 0.88\nmass",
        "missed: 0.25\nmass",
    ]
    # A threshold of 0.25 finds image 0, and calls 1 as well.
    lower = np.array([0.25, np.nan])
    assert choose_finding_errors(target, score, lower).tolist() == [[2, 0], [3, 0], [1, 0]]
    assert finding_errors_figure(images, target, target.clip(0, 1) * 1.0, ("m", "n"), ids) is None


def test_found_findings_are_of_different_kinds_first():
    target = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [1, 0]], np.int8)
    score = np.array([[0.9, 0.1], [0.95, 0.1], [0.6, 0.7], [0.8, 0.65], [0.25, 0.9]])
    half = np.array([0.5, 0.5])
    assert choose_found_findings(target, score, half).tolist() == [[1, 0], [2, 1], [0, 0], [3, 1]]
    # Four images have the first finding: the four highest scores are called.
    assert choose_found_findings(target, score)[:, 0].tolist() == [1, 2, 0]


def test_rare_findings_are_found_below_a_half():
    # Five of a hundred images have it, whose probabilities are 0.02 to 0.1.
    target, score = np.zeros((100, 2), np.int8), np.full((100, 2), 0.001, np.float32)
    score[:, 0] += np.arange(100, dtype=np.float32) / 10_000
    target[10:15, 0], target[15:20, 0] = 1, -1
    score[10:15, 0] = 0.02, 0.04, 0.06, 0.08, 0.1
    score[20, 0] = 0.05
    assert choose_found_findings(target, score).tolist() == [[14, 0], [13, 0], [12, 0], [11, 0]]
    # As many are called as have it: the false alarm takes the place of the least probable.
    assert choose_finding_errors(target, score).tolist() == [[20, 0], [10, 0]]
    thresholds = np.array([0.07, 0.5])
    found = choose_found_findings(target, score, thresholds)
    assert found.tolist() == [[14, 0], [13, 0]]
    errors = choose_finding_errors(target, score, thresholds)
    assert errors.tolist() == [[10, 0], [11, 0], [12, 0]]
    cases = choose_explained("multilabel", target, score, ("rare", "none"), thresholds=thresholds)
    assert cases.rows.tolist() == [14, 13, 10, 11, 12]
    assert cases.right == (True, True, False, False, False)


def test_agreement_has_the_limits_of_bland_and_altman():
    # Differences 1, -1, 3, 1: mean 1, standard deviation (n - 1) sqrt(8 / 3) = 1.63299.
    target = np.array([[10], [20], [30], [40], [np.nan]], np.float32)
    score = np.array([[11], [19], [33], [41], [7]], np.float32)
    axes = agreement_figure(target, score, ("age",)).axes[0]
    np.testing.assert_array_equal(
        axes.collections[0].get_offsets(), [[10.5, 1], [19.5, -1], [31.5, 3], [40.5, 1]]
    )
    lines = [line.get_ydata()[0] for line in axes.get_lines()]
    np.testing.assert_allclose(lines, [1, 1 - 1.96 * 1.632993, 1 + 1.96 * 1.632993], rtol=1e-6)
    predicted = predicted_figure(target, score, ("age",))
    assert titles(predicted) == ["age: MAE 1.5"]
    bars = residuals_figure(target, score, ("age",)).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 4


def test_errors_of_numbers_are_measured_in_spreads_of_the_truth():
    # The second number spreads 100 times as much, so that its errors count a hundredth.
    target = np.array([[0, 0], [2, 200], [np.nan, 100]], np.float32)
    score = np.array([[1, 50], [2.5, 220], [99, 180]], np.float32)
    assert choose_number_errors(target, score).tolist() == [[0, 0], [2, 1], [1, 0]]
    assert choose_closest(target, score).tolist() == [[1, 1], [0, 1], [2, 1]]
    images, ids = np.zeros((3, 8, 8, 1), np.uint8), np.array(list("abc"))
    figure = number_errors_figure(images, target, score, ("age", "area"), ids)
    assert titles(figure)[:2] == ["age: 1\ntrue 0 (+1)", "area: 180\ntrue 100 (+80)"]
    assert number_errors_figure(images[:2], target[:2], target[:2], ("a", "b"), ids) is None


def test_a_target_that_is_never_known_leaves_its_panel_empty():
    target = np.full((3, 1), np.nan, np.float32)
    for draw in (predicted_figure, agreement_figure, residuals_figure):
        assert encode_png(draw(target, np.zeros((3, 1), np.float32), ("age",)), 30)


def test_best_median_and_worst_mask():
    dice = np.array([[0.5, 0.7], [0.9, np.nan], [np.nan, np.nan], [0.2, 0.2], [0.7, 0.8]])
    # Means 0.6, 0.9, none, 0.2, 0.75.
    assert choose_cases(dice) == {"best": 1, "median": 0, "worst": 3}
    assert choose_cases(dice[1:4]) == {"best": 0, "worst": 2}
    assert choose_cases(dice[3:4]) == {"worst": 0}
    assert choose_cases(dice[2:3]) == {}


def test_overlays_show_differences_or_the_second_observer():
    image = np.zeros((4, 4, 1), np.uint8)
    truth, predicted = np.zeros((2, 4, 4), np.uint8)
    truth[0, :2], predicted[0, 1:3] = 1, 1
    arguments = ("worst", image, truth, predicted, ("background", "lesion"), "id", 0.5)
    figure = overlay_figure(*arguments)
    assert titles(figure) == ["id", "truth", "prediction: Dice 0.500", "differences"]
    missed, alarm = (layer.get_array()[..., 3] > 0 for layer in figure.axes[3].images[1:])
    assert np.argwhere(missed).tolist() == [[0, 0]] and np.argwhere(alarm).tolist() == [[0, 2]]
    second = overlay_figure(*arguments, (truth, 1.0))
    assert titles(second)[3] == "observer 2: Dice 1.000"
    assert "second observer" in second.get_label() and legend(second) == ["lesion"]
    assert encode_png(second, 30)


def test_dice_of_a_second_observer_stands_below_that_of_the_network():
    truth, second = np.zeros((2, 3, 4, 4), np.uint8)
    truth[0, 0], truth[1, 0], second[0, 0, :2] = 1, 1, 1
    # Two of four pixels found: 2 * 2 / (4 + 2); none; neither has the class.
    dice = observer_dice(truth, second, ("background", "lesion"))
    np.testing.assert_allclose(dice, [[2 / 3], [0], [math.nan]])
    axes = dice_figure(np.ones((3, 1)), ("background", "lesion"), dice).axes[0]
    assert written(axes) == [
        "lesion (n = 3, mean 1.000)", "lesion, observer 2 (n = 2, mean 0.333)",
    ]  # fmt: skip
    empty = dice_figure(np.full((2, 1), np.nan), ("background", "lesion"))
    assert written(empty.axes[0]) == ["lesion (n = 0)"] and encode_png(empty, 30)


def test_a_view_with_a_second_observer_and_calibration():
    shown = view("segment")
    figures = draw_figures("segment", dataclasses.replace(shown, mask2=shown.target))
    assert "observer 2: Dice 1.000" in titles(figures["overlay_best"])
    shown = view("multilabel")
    figures = draw_figures("multilabel", dataclasses.replace(shown, calibrated=shown.score))
    assert "after temperature scaling" in legend(figures["reliability"])


@pytest.mark.parametrize(
    ("task", "first"),
    [
        ("classify", "no 0.9"), ("ordinal", "none 0.9"), ("multilabel", "mass 1.00, truth: yes"),
        ("regress", "a"),
    ],
)  # fmt: skip
def test_explained_cases_are_right_and_wrong(task, first):
    shown = view(task)
    cases = choose_explained(task, shown.target, shown.score, shown.classes, 2)
    assert cases.right == (True, True, False, False) and len(set(cases.rows.tolist())) == 4
    assert cases.titles[0].startswith(first)
    if task == "classify":
        np.testing.assert_array_equal(cases.label, shown.score[cases.rows].argmax(axis=1))


def test_gradcam_says_how_far_the_map_depends_on_the_weights():
    given = view("classify").explanations
    figure = gradcam_figure(given)
    assert f"the two: {given.correlation.mean():.2f}; near 1" in figure.get_label()
    assert figure.axes[2].get_xlabel() == "random weights, r = -0.20"
    assert len(figure.axes) == 3 * len(given.images)
