"""The section of a report on the audit of its data."""

import numpy as np

from medtl_jax.report.audit import audit_figure, audit_part

PAIR = {
    "first": ["train", "<b>one"],
    "second": ["test", "two"],
    "fit": 0.9512,
    "exact": False,
    "mirrored": True,
    "crop": [0.05, 0.0, 0.002, 0.0],
    "conflict": True,
}


def test_what_was_found_is_listed():
    audit = {"findings": ["a finding"], "notes": ["a <note>"], "pairs": [PAIR], "pairs_found": 7}
    part = audit_part(audit)
    for words in ("a finding", "a &lt;note&gt;", "copies: 1 of 7", "train: &lt;b&gt;one"):
        assert words in part
    assert "fit 0.951, mirrored, cropped" in part and "labels differ" in part
    exact = {**PAIR, "exact": True, "mirrored": False, "crop": [0.0] * 4, "conflict": False}
    part = audit_part({**audit, "pairs": [exact], "pairs_found": 1})
    assert "same pixels" in part and "copies: 1<" in part and "labels differ" not in part


def test_nothing_found_and_nothing_looked_for_are_told_apart():
    assert "nothing else was found" in audit_part(
        {"findings": [], "notes": [], "pairs": [], "pairs_found": 0}
    )
    assert "not audited (data.audit=off)" in audit_part("off")


def test_a_column_shows_each_pair():
    grey, colour = np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 3), np.uint8)
    figure = audit_figure([(grey, grey, "a"), (colour, grey, "b"), (grey, colour, "c")])
    assert len(figure.axes) == 6
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == ["a", "b", "c"]
