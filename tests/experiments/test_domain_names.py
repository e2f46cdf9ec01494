"""Names of a source and a target whose sets are called the same."""

import pytest

from configs import default
from experiments.domain_settings import names_apart
from medtl_jax import runs


def config_of(**settings) -> dict:
    flat = {key.replace("__", "."): value for key, value in settings.items()}
    config = default.get_config().to_dict()
    return runs.nested_config(config, {**runs.flat_config(config), **flat})


@pytest.mark.parametrize(
    ("source", "target", "names"),
    [
        ("/data/children/labels.csv", "/data/adults/labels.csv",
         ("children/labels.csv", "adults/labels.csv")),
        ("/a/xray/labels.csv", "/b/xray/labels.csv", ("a/xray/labels.csv", "b/xray/labels.csv")),
        ("/a/xray/labels.csv", "/a/xray/labels.csv", ("labels.csv", "labels.csv")),
    ],
)  # fmt: skip
def test_sets_of_one_name_are_told_apart_by_their_folders(source, target, names):
    both = {"data__name": "csv", "domain__target__name": "csv"}
    config = config_of(**both, data__dir=source, domain__target__dir=target)
    assert names_apart(config, "labels.csv", "labels.csv") == names


def test_rows_of_one_table_are_told_apart():
    both = {"data__name": "csv", "domain__target__name": "csv"}
    both |= {"data__dir": "labels.csv", "domain__target__dir": "labels.csv"}
    config = config_of(**both, data__csv_where="scanner=a")
    assert names_apart(config, "labels.csv", "labels.csv") == (
        "labels.csv (scanner=a)",
        "labels.csv (all rows)",
    )


def test_phantoms_are_told_apart_by_their_scanners():
    config = config_of(domain__target__name="phantom", data__phantom__domain="b")
    assert names_apart(config, "phantom", "phantom") == (
        "phantom (scanner b)",
        "phantom (scanner a)",
    )


def test_other_names_stay():
    config = config_of(domain__target__name="phantom")
    assert names_apart(config, "digits", "phantom") == ("digits", "phantom")
