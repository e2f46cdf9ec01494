"""The README keeps its promises: two commands, links that lead somewhere, keys that exist."""

import pathlib
import re

from configs import default
from medtl_jax.runs import flat_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_relative_links_and_pictures_exist():
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_the_quickstart_holds_two_commands():
    quickstart = README.split("## Quickstart")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", quickstart, re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert "launch.py" in blocks[0]
    assert "pytest" in blocks[1]


def test_every_setting_named_is_a_key():
    named = set(re.findall(r"--config\.([a-z_.]+)=", README)) - {"section.key"}
    assert named
    assert named <= set(flat_config(default.get_config().to_dict()))
