import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from medtl_jax.errors import UserError
from medtl_jax.metrics.scores import confusion
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report.figures import (
    choose_examples,
    confusion_figure,
    curves_figure,
    encode_png,
    examples_figure,
    metrics_figure,
    roc_figure,
    save_figures,
)
from medtl_jax.report.html import write_report
from medtl_jax.report.tables import metrics_table, printable

HOSTILE = ("<script>alert(1)</script>", 'x" onerror="y', "$\\frac$ 50 %", "肝\n\x1b[31m")


def predictions(n, k, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, k, n)
    score = np.exp(rng.normal(size=(n, k)) + 2 * np.eye(k)[target])
    return target, score / score.sum(axis=1, keepdims=True)


def epochs(n=4):
    return [
        {
            "epoch": i + 1, "step": 10 * (i + 1), "train_loss": 1 / (i + 1), "val_loss": 0.9,
            "val_accuracy": 0.5 + 0.1 * i, "val_auc": None if i == 0 else 0.9,
            "lr_low": 1e-4, "lr_high": 1e-3, "seconds": 1.5, "images_per_second": 90.0,
            "best": i in (0, 2),
        }
        for i in range(n)
    ]  # fmt: skip


def parts(classes, seed=0):
    """What a run hands to the report."""
    k = len(classes)
    target, score = predictions(80, k, seed)
    metrics = score_with_intervals(target, score, classes, resamples=50)
    chosen = choose_examples(target, score)
    images = np.random.default_rng(0).integers(0, 256, (len(chosen), 24, 24, 1), np.uint8)
    history = epochs()
    figures = {
        "curves": curves_figure(history),
        "metrics": metrics_figure(metrics),
        "confusion": confusion_figure(confusion(target, score), classes),
        "roc": roc_figure(target, score, classes, metrics),
        "examples": examples_figure(
            images, target[chosen], score[chosen], classes, [f"{classes[0]}/{i}" for i in chosen]
        ),
    }
    counts = {
        name: int(n) for name, n in zip(classes, np.bincount(target, minlength=k), strict=True)
    }
    return {
        "title": f"Run on {classes[0]}",
        "command": "python launch.py --config=configs/finetune.py --config.data.dir='a & b'",
        "config": {"seed": 7, "data": {"name": "folder", "classes": list(classes)}},
        "environment": {
            "jax": "0.10.2", "devices": ["cpu:0"], "commit": "c0ffee",
            "weights": {"name": "lite0", "sha256": "ab12", "report": "loaded 3\nskipped <1>"},
        },
        "data": {
            "name": "set", "task": "classify", "classes": list(classes),
            "counts": {"train": counts, "test": counts}, "patients": {"train": 9, "test": 3},
            "image_size": 24, "channels": 1, "licence": "CC BY", "source": "https://a.org/<b>",
            "notes": ["a note & more"], "sha256": "cd34",
        },
        "history": history,
        "metrics": {"val": metrics, "test": metrics},
        "figures": figures,
        "notes": ["Not a medical device."],
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """Collects tags, addresses and visible text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset")]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_report(folder / "deep" / "report.html", **parts(HOSTILE))
    return folder / "deep"


def test_report_is_one_closed_file_without_outside_reference(hostile):
    assert [path.name for path in hostile.iterdir()] == ["report.html"]
    text = (hostile / "report.html").read_text("utf-8")
    page = Page(text)
    assert len(text) < 2_000_000
    assert len(page.addresses) == 5 and page.tags.count("img") == 5
    for address in page.addresses:
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert "@import" not in text and "url(" not in text


def test_hostile_names_are_escaped(hostile):
    text = (hostile / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and "a" not in page.tags
    assert "\x1b" not in text
    visible = "".join(page.text)
    assert "<script>alert(1)</script>" in visible and 'x" onerror="y' in visible
    assert "肝\\n\\x1b[31m" in visible


def test_report_holds_what_a_reader_needs(hostile):
    visible = "".join(Page((hostile / "report.html").read_text("utf-8")).text)
    entry = parts(HOSTILE)["metrics"]["test"]["auc"]
    low, high = entry["ci95"]
    assert f"AUC{entry['value']:.4f}{low:.4f} to {high:.4f}" in visible
    for words in (
        "Results on the test split", "--config.data.dir='a & b'", "seed7", "commitc0ffee",
        "weights sha256ab12", "data sha256cd34", "patients93", "https://a.org/<b>", "CC BY",
        "a note & more", "Not a medical device.", "skipped <1>", '"seed": 7', "jax0.10.2",
    ):  # fmt: skip
        assert words in visible, words


def test_equal_inputs_give_equal_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, **parts(("no", "yes")))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_undefined_metric_and_untrained_run_are_said(tmp_path):
    given = parts(("no", "yes", "rare"))
    target = np.array([0, 1] * 20)
    score = np.tile([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], (20, 1))
    metrics = score_with_intervals(target, score, ("no", "yes", "rare"), resamples=20)
    figures = {
        "metrics": metrics_figure(metrics),
        "roc": roc_figure(target, score, ("no", "yes", "rare"), metrics),
        "confusion": confusion_figure(confusion(target, score), ("no", "yes", "rare")),
    }
    given |= {"metrics": {"val": metrics}, "figures": figures, "history": []}
    given["environment"] = {"weights": None}
    given["data"] |= {"patients": None}
    write_report(tmp_path / "report.html", **given)
    visible = "".join(Page((tmp_path / "report.html").read_text("utf-8")).text)
    for words in (
        "Results on the val split", "recall (sensitivity)undefinedno image of class 'rare'",
        "This run trained nothing.", "No pretrained weights were loaded.", "commitnot recorded",
        "two images of one patient may be in different splits", "An interval of no width",
    ):  # fmt: skip
        assert words in visible, words
    assert "nan" not in visible.lower()
    # The curve of the class without images is named in the legend, not drawn.
    legend = [text.get_text() for text in figures["roc"].axes[0].get_legend().get_texts()]
    assert legend[-1] == "rare: undefined"


def test_a_figure_of_noise_keeps_the_page_below_two_megabytes(tmp_path):
    given = parts(("no", "yes"))
    target, score = predictions(12, 2)
    noise = np.random.default_rng(0).integers(0, 256, (12, 300, 300, 3), np.uint8)
    figure = examples_figure(noise, target, score, ("no", "yes"), [str(i) for i in range(12)])
    assert len(encode_png(figure)) > 1_500_000
    given["figures"]["examples"] = figure
    write_report(tmp_path / "report.html", **given)
    assert 500_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html: .*--workdir"):
        write_report(tmp_path / "report.html", **parts(("no", "yes")))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_save_figures_writes_the_same_bytes_without_metadata(tmp_path):
    figures = {"curves": curves_figure(epochs())}
    save_figures(figures, tmp_path / "one" / "figures")
    save_figures({"curves": curves_figure(epochs())}, tmp_path / "two")
    first = (tmp_path / "one" / "figures" / "curves.png").read_bytes()
    assert first == (tmp_path / "two" / "curves.png").read_bytes()
    assert set(Image.open(io.BytesIO(first)).info) <= {"dpi"}


def test_figures_show_the_numbers():
    target, score = predictions(50, 2, 1)
    metrics = score_with_intervals(target, score, ("no", "yes"), resamples=50)
    table = confusion(target, score)
    texts = [text.get_text() for text in confusion_figure(table, ("no", "yes")).axes[0].texts]
    assert texts[1] == f"{table[0, 1]}\n{table[0, 1] / table[0].sum():.1%}"
    axes = roc_figure(target, score, ("no", "yes"), metrics).axes[0]
    x, y = axes.get_lines()[1].get_data()
    assert np.trapezoid(y, x) == pytest.approx(metrics["auc"]["value"], abs=1e-12)
    assert f"{metrics['auc']['value']:.4f}" in axes.get_legend().get_texts()[0].get_text()
    loss, scores, _ = curves_figure(epochs()).axes
    np.testing.assert_array_equal(loss.get_lines()[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    # The last epoch called best is the one kept.
    assert "kept: epoch 3" in [text.get_text() for text in loss.get_legend().get_texts()]
    assert np.isnan(scores.get_lines()[1].get_ydata()[0])
    widths = [bar.get_width() for bar in metrics_figure(metrics).axes[0].patches]
    names = ("accuracy", "precision", "recall", "specificity", "f1", "auc")
    assert widths == [metrics[name]["value"] for name in names]


def test_figures_of_many_classes_can_be_drawn():
    names = [f"class with a long name {i}" for i in range(30)]
    target, score = predictions(600, 30)
    metrics = score_with_intervals(target, score, names, resamples=20)
    assert encode_png(confusion_figure(confusion(target, score), names), 40)
    figure = roc_figure(target, score, names, metrics)
    assert encode_png(figure, 40)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(legend) == 8 and legend[-1] == "23 classes of higher AUC"
    # Names cut to the same beginning stay distinct.
    assert len(set(legend)) == 8


def test_examples_are_half_right_half_wrong():
    # Class 0: images 0-3 right; class 1: 4-5 right; 6 and 7 wrong, 7 worse.
    target = np.array([0, 0, 0, 0, 1, 1, 0, 1])
    one = np.array([0.1, 0.3, 0.2, 0.4, 0.7, 0.6, 0.8, 0.05])
    score = np.stack([1 - one, one], axis=1)
    assert choose_examples(target, score, 4).tolist() == [0, 4, 7, 6]
    # Two errors at most exist: right ones fill up, class by class in turn.
    assert choose_examples(target, score, 8).tolist() == [0, 4, 2, 5, 1, 3, 7, 6]
    # No right one: errors fill up.
    assert choose_examples(1 - target[:4], score[:4], 4).tolist() == [0, 2, 1, 3]
    with pytest.raises(ValueError, match="1 to 12"):
        examples_figure(np.zeros((13, 8, 8, 1), np.uint8), target, score, ("a", "b"), [])


def test_wrong_examples_are_marked_in_words_and_frame():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    score = np.array([[0.9, 0.1], [0.75, 0.25]])
    figure = examples_figure(images, np.array([0, 1]), score, ("a$b", "c"), ["i/1", "i/2"])
    right, wrong = figure.axes
    assert right.get_title("left") == "right: a\\$b 0.90\ntruth: a\\$b"
    assert wrong.get_title("left") == "wrong: a\\$b 0.75\ntruth: c"
    assert wrong.spines["left"].get_linewidth() > right.spines["left"].get_linewidth()
    assert encode_png(figure, 40)


def test_terminal_table():
    metrics = {
        "accuracy": {"value": 0.92154, "ci95": [0.9, 0.94], "n": 624},
        "auc/\x1b[2J": {"value": None, "ci95": None, "n": 624, "reason": "no image"},
    }
    assert metrics_table(metrics).splitlines() == [
        "metric           value  95% CI              n",
        "accuracy        0.9215  0.9000 to 0.9400  624",
        "auc/\\x1b[2J  undefined                    624  no image",
    ]
    clustered = {"accuracy": {"value": 1.0, "ci95": None, "n": 9, "n_patients": 3}}
    assert metrics_table(clustered).endswith("\nIntervals resample whole patients (3).")


def test_printable_keeps_letters_and_escapes_the_rest():
    assert printable("Grün 肝 1") == "Grün 肝 1"
    assert printable("a\n\u202eb\udcff") == "a\\n\\u202eb\\udcff"
    assert re.fullmatch(r"[ -~]*", printable("\x00\x07\x9b"))
