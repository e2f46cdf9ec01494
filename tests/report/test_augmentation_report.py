"""The contact sheet of an augmentation, and its section in the report."""

import numpy as np
import pytest
from report_tasks import view
from test_report import Page, given

from medtl_jax.report.augmentation import Sheet, contact_sheet
from medtl_jax.report.html import write_report
from medtl_jax.report.style import encode_png

N, DRAWS, SIDE = 3, 5, 16


def sheet(channels=1, **more):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, SIDE, SIDE, channels), np.uint8)
    draws = rng.integers(0, 256, (N, DRAWS, SIDE, SIDE, channels), np.uint8)
    return Sheet(images, draws, np.array([f"folder/{i}$.png" for i in range(N)]), **more)


def masks():
    found = np.zeros((N, SIDE, SIDE), np.uint8)
    found[0, 2:6, 3:9] = 1
    found[1, 8:, :4], found[1, :4, 8:] = 1, 2
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_an_image_the_image_first(channels):
    shown = sheet(channels)
    figure = contact_sheet(shown)
    assert len(figure.axes) == N * (1 + DRAWS)
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    wanted = np.concatenate([shown.images[:, None], shown.draws], axis=1).reshape(
        -1, SIDE, SIDE, channels
    )
    for found, image in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(found, image[..., 0] if channels == 1 else image)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[: 1 + DRAWS] == ["image", *(f"draw {i}" for i in range(1, DRAWS + 1))]
    assert not any(titles[1 + DRAWS :])
    assert encode_png(figure).startswith(b"\x89PNG")
    assert "mask" not in figure.get_label() and "mixed" not in figure.get_label()
    assert figure.get_figwidth() < 10


def test_masks_are_outlined_in_the_image_and_in_its_draws():
    moved = np.zeros((N, DRAWS, SIDE, SIDE), np.uint8)
    moved[0, 2, 4:8, 5:11] = 1
    figure = contact_sheet(sheet(masks=masks(), moved=moved, mixed=True))
    outlines = [len(axes.collections) for axes in figure.axes]
    # One for each class that is there.
    assert [outlines[i * (1 + DRAWS)] for i in range(N)] == [1, 2, 0]
    assert outlines[1 : 1 + DRAWS] == [0, 0, 1, 0, 0] and sum(outlines) == 4
    (path,) = figure.axes[3].collections[0].get_paths()
    low, high = path.vertices.min(0), path.vertices.max(0)
    # Half way between the last pixel inside and the first one outside, (column, row).
    np.testing.assert_allclose([low, high], [[4.5, 3.5], [10.5, 7.5]], atol=1e-6)
    assert "outlines of their masks" in figure.get_label()
    assert "Images of a column are mixed with each other." in figure.get_label()


def test_the_report_has_a_section_where_something_was_done(tmp_path):
    lines = ["Transforms (preset xray): rotate 10.", "Labels: no flips, <b> is no tag."]
    parts = given("classify", view("classify"), figures={"augmentation": contact_sheet(sheet())})
    write_report(tmp_path / "with.html", **parts, augmentation=lines)
    page = Page(tmp_path / "with.html")
    assert page.tags.count("img") == 1 and page.visible.count("Augmentation") == 1
    for line in lines:
        assert line in page.visible
    write_report(tmp_path / "without.html", **given("classify", view("classify"), figures={}))
    assert "Augmentation" not in Page(tmp_path / "without.html").visible
