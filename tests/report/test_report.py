import base64
import html.parser
import io

import numpy as np
import pytest
from PIL import Image
from report_tasks import CLASSES, epochs, probabilities, view

from medtl_jax.errors import UserError
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report import markup
from medtl_jax.report.curves import curves_figure, metrics_figure
from medtl_jax.report.datacard import count_targets
from medtl_jax.report.figures import View, draw_figures
from medtl_jax.report.html import write_report
from medtl_jax.report.markup import picture, table
from medtl_jax.report.style import encode_png, new_figure, save_figures

HOSTILE = ("<script>alert(1)</script>", 'x" onerror="y', "$\\frac$ 50 %", "肝\n\x1b[31m")
CALIBRATION = {
    "fitted_on": "val",
    "target_sensitivity": 0.95,
    "temperature": [1.25],
    "thresholds": {"yes": {"youden": 0.625, "sensitivity": None}},
    "reasons": {"temperature": "kept for a reason"},
}


def given(task, shown, **changes):
    """What a run hands to the report."""
    classes = list(shown.classes)
    counts = count_targets(task, classes, {"train": shown.target, "test": shown.target})
    return {
        "title": f"Run on {classes[0]}",
        "command": "python launch.py --config=configs/finetune.py --config.data.dir='a & b'",
        "config": {"seed": 7, "data": {"name": "folder", "classes": classes}},
        "environment": {
            "jax": "0.10.2", "devices": ["cpu:0"], "commit": "c0ffee",
            "weights": {"name": "lite0", "sha256": "ab12", "report": "loaded 3\nskipped <1>"},
        },
        "data": {
            "name": "set", "task": task, "classes": classes, **counts,
            "patients": {"train": 9, "test": 3}, "image_size": 24, "channels": 1,
            "licence": "CC BY", "source": "https://a.org/<b>", "notes": ["a note & more"],
            "sha256": "cd34",
        },
        "history": shown.history,
        "metrics": {"val": shown.metrics, "test": shown.metrics},
        "notes": ["Not a medical device."],
        "figures": draw_figures(task, shown) if "figures" not in changes else {},
        **changes,
    }  # fmt: skip


def hostile_view():
    target, score = probabilities(80, 4)
    metrics = score_with_intervals("classify", target, score, HOSTILE, resamples=20)
    images = np.random.default_rng(0).integers(0, 256, (80, 24, 24, 1), np.uint8)
    ids = np.array([f"{HOSTILE[0]}/{i}" for i in range(80)])
    return View(HOSTILE, target, score, images, ids, metrics, epochs())


class Page(html.parser.HTMLParser):
    """Collects tags, addresses and visible text, and checks that tags are closed in order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.alts, self.text, self.open = [], [], [], [], []
        self.feed(path.read_text("utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset")]
        self.alts += [value for key, value in attrs if key == "alt"]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def visible(self):
        return "".join(self.text)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_report(folder / "deep" / "report.html", **given("classify", hostile_view()))
    return folder / "deep"


def test_report_is_one_closed_file_without_outside_reference(hostile):
    assert [path.name for path in hostile.iterdir()] == ["report.html"]
    text = (hostile / "report.html").read_text("utf-8")
    page = Page(hostile / "report.html")
    assert len(text) < 5_000_000
    # metrics, curves, confusion, roc, pr, reliability, examples, errors
    assert len(page.addresses) == 8 and page.tags.count("img") == 8
    for address in page.addresses:
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert "@import" not in text and "url(" not in text


def test_hostile_names_are_escaped(hostile):
    page = Page(hostile / "report.html")
    assert "script" not in page.tags and "a" not in page.tags
    assert "\x1b" not in (hostile / "report.html").read_text("utf-8")
    assert "<script>alert(1)</script>" in page.visible and 'x" onerror="y' in page.visible
    assert "肝\\n\\x1b[31m" in page.visible


def test_report_holds_what_a_reader_needs(hostile):
    visible = Page(hostile / "report.html").visible
    entry = hostile_view().metrics["auc"]
    low, high = entry["ci95"]
    assert f"AUC{entry['value']:.4f}{low:.4f} to {high:.4f}" in visible
    assert "DeLong " + " to ".join(f"{end:.4f}" for end in entry["delong95"]) in visible
    for words in (
        "Results on the test split", "--config.data.dir='a & b'", "seed7", "commitc0ffee",
        "weights sha256ab12", "data sha256cd34", "patients93", "images8080", "https://a.org/<b>",
        "CC BY", "a note & more", "Not a medical device.", "skipped <1>", '"seed": 7', "jax0.10.2",
        "gradient norm low", "test: by class",
    ):  # fmt: skip
        assert words in visible, words


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            "classify",
            ["Confusion matrix", "Examples and worst errors", "Mean Spearman correlation"],
        ),
        ("ordinal", ["quadratic kappa", "ROC and precision-recall curves"]),
        ("multilabel", ["test: by finding", "40 no", "4 missing", "n counts the images"]),
        ("segment", ["% of pixels", "Masks", "HD95 (pixels)", "Confusion matrix: pixels"]),
        (
            "regress",
            ["MAE: age", "R²: area", "test: by target", "limits of agreement", "5 missing"],
        ),
    ],
)
def test_a_report_of_each_task(tmp_path, task, words):
    path = tmp_path / "report.html"
    write_report(path, **given(task, view(task)))
    page = Page(path)
    assert path.stat().st_size < 5_000_000
    assert len(page.alts) == page.tags.count("img") and all(page.alts)
    assert "nan" not in page.visible.lower()
    for word in words:
        assert word in page.visible, word


def test_the_set_that_was_adapted_to_stands_with_the_data(tmp_path):
    card = {
        "name": HOSTILE[0], "source": "b.npz", "images": {"train": 48, "test": 30},
        "labelled": [], "notes": ["a note on the target"], "sha256": "9a7e",
    }  # fmt: skip
    shown = view("classify")
    content = given("classify", shown, figures={})
    content["environment"] |= {"target": card}
    content["metrics"] = {"val": shown.metrics, "source_test": shown.metrics}
    write_report(tmp_path / "report.html", **content)
    visible = Page(tmp_path / "report.html").visible
    assert f"adapted to{HOSTILE[0]}" in visible and "its imagestrain 48, test 30" in visible
    assert "its labelsnone" in visible and "a note on the target" in visible
    assert visible.count("9a7e") == 1, "it stands in the environment too"
    assert "source's own test" in visible


def test_calibration_and_operating_points_have_their_sections(tmp_path):
    shown = view("classify")

    def entry(value):
        return {"value": value, "ci95": [value - 0.0625, value + 0.0625], "n": 40}

    added = {"ece": entry(0.25), "ece_calibrated": entry(0.125)} | {
        f"{metric}@youden": entry(0.75) for metric in ("recall", "specificity", "precision")
    }
    metrics = {"test": shown.metrics | added}
    changes = {"metrics": metrics, "calibration": CALIBRATION, "figures": {}}
    write_report(tmp_path / "report.html", **given("classify", shown, **changes))
    visible = Page(tmp_path / "report.html").visible
    assert "temperature1.25 (kept for a reason)" in visible
    assert "calibration error (ECE)0.25000.1875 to 0.31250.12500.0625 to 0.1875" in visible
    assert "Youden0.62500.75000.6875 to 0.8125" in visible
    # The metric table has neither of them.
    assert "(ECE), calibrated" not in visible and "@" not in visible


def test_the_main_split_comes_first_by_image_and_by_patient(tmp_path):
    shown = view("classify")
    metrics = {"val": shown.metrics, "test": shown.metrics, "test_patient": shown.metrics}
    parts = given("classify", shown, metrics=metrics, figures={})
    write_report(tmp_path / "report.html", **parts)
    visible = Page(tmp_path / "report.html").visible
    places = [
        visible.index(f"{name}: overall") for name in ("test", "test, averaged by patient", "val")
    ]
    assert places == sorted(places)


def test_equal_inputs_give_equal_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        figures = {"metrics": metrics_figure(view("classify").metrics)}
        write_report(tmp_path / name, **given("classify", view("classify"), figures=figures))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_undefined_metric_and_untrained_run_are_said(tmp_path):
    classes = ("no", "yes", "rare")
    target = np.array([0, 1] * 20)
    score = np.tile([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], (20, 1))
    metrics = score_with_intervals("classify", target, score, classes, resamples=20)
    images, ids = np.zeros((40, 8, 8, 1), np.uint8), np.array([str(i) for i in range(40)])
    shown = View(classes, target, score, images, ids, metrics)
    parts = given("classify", shown, metrics={"val": metrics}, environment={"weights": None})
    parts["data"] |= {"patients": None}
    write_report(tmp_path / "report.html", **parts)
    visible = Page(tmp_path / "report.html").visible
    for words in (
        "Results on the val split", "undefined", metrics["recall"]["reason"],
        "This run trained nothing.", "No pretrained weights were loaded.", "commitnot recorded",
        "two images of one patient may be in different splits",
        "no resample differs, which does not mean certainty",
    ):  # fmt: skip
        assert words in visible, words
    assert "nan" not in visible.lower()
    # Nothing is wrong, so there are no errors to show.
    assert "errors" not in parts["figures"]


def test_a_run_without_scores_is_said(tmp_path):
    parts = given("regress", view("regress"), metrics={}, figures={})
    write_report(tmp_path / "report.html", **parts)
    assert "No split was scored in this run." in Page(tmp_path / "report.html").visible


def test_noisy_figures_get_fewer_dots_until_the_page_is_small(tmp_path, monkeypatch):
    assert markup.PICTURE_BYTES * 4 / 3 < 4_500_000
    monkeypatch.setattr(markup, "PICTURE_BYTES", 250_000)
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    figures = {name: new_figure(3.0, name, 3.0) for name in "abc"}
    for figure in figures.values():
        figure.add_subplot().imshow(noise, interpolation="nearest")
    figures["small"] = new_figure(2.0, "d")
    sizes = {name: len(encode_png(figure)) for name, figure in figures.items()}
    assert min(sizes[name] for name in "abc") > 150_000
    write_report(tmp_path / "report.html", **given("classify", view("classify"), figures=figures))
    contents = Page(tmp_path / "report.html").addresses
    shown = [len(base64.b64decode(content.partition(",")[2])) for content in contents]
    assert 150_000 < sum(shown) <= 250_000
    # What takes little is not made worse for it.
    assert sizes["small"] in shown


def test_a_picture_is_shown_as_wide_as_it_was_drawn():
    for inches, size in ((4.0, 'width="400"'), (10.0, 'width="1000" style="min-width: 800px')):
        figure = new_figure(1.0, "caption", inches)
        for dots in (140, 70):
            assert f"<img {size}" in picture("caption", encode_png(figure, dots))


def test_tables_align_numbers_and_want_as_many_cells_as_heads():
    assert '<td class="num">1</td>' in table(("a", "b"), [("x", 1)], numbers=True)
    assert "<td>1</td>" in table(("a", "b"), [("x", 1)])
    with pytest.raises(ValueError, match="zip"):
        table(("a", "b"), [("x",)])


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html: .*--workdir"):
        write_report(tmp_path / "report.html", **given("regress", view("regress"), figures={}))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_save_figures_writes_the_same_bytes_without_metadata(tmp_path):
    for place in (tmp_path / "one" / "figures", tmp_path / "two"):
        save_figures({"curves": curves_figure(epochs())}, place)
    first = (tmp_path / "one" / "figures" / "curves.png").read_bytes()
    assert first == (tmp_path / "two" / "curves.png").read_bytes()
    assert set(Image.open(io.BytesIO(first)).info) <= {"dpi"}


def test_targets_are_counted_for_the_data_card():
    def rows(task, target):
        found = count_targets(task, CLASSES[task], {"train": target})
        assert found["images"] == {"train": len(target)}
        return found["counts"]["train"]

    assert rows("classify", np.array([1, 1, 0, 1], np.int32)) == {"no": 1, "yes": 3}
    labels = np.array([[1, 0, -1], [1, 1, -1], [0, 0, 0]], np.int8)
    assert rows("multilabel", labels) == {
        "mass": "2 yes, 1 no", "nodule": "1 yes, 2 no", "hernia": "0 yes, 1 no, 2 missing",
    }  # fmt: skip
    masks = np.zeros((100, 4, 4), np.uint8)
    masks[:, :2], masks[70:, 3, 3] = 1, 2
    assert rows("segment", masks) == {
        "background": "48.12% of pixels", "lesion": "50.00% of pixels", "vessel": "1.88% of pixels",
    }  # fmt: skip
    numbers = np.array([[40, np.nan], [44, np.nan], [48, np.nan]], np.float32)
    # The standard deviation of 40, 44, 48 is sqrt(32 / 3) = 3.266.
    assert rows("regress", numbers) == {"age": "44 ± 3.27 (40 to 48)", "area": "none known"}
    numbers[1, 0] = np.nan
    assert rows("regress", numbers)["age"] == "44 ± 4 (40 to 48), 1 missing"
