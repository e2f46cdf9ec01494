"""The audit before a training: recorded, kept, refused above the limit, turned off."""

import numpy as np
import pytest
from digit_runs import ROOT, SETTINGS, digits

from experiments import auditing
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError


def write_set(path, copied):
    """Digits; the first `copied` of 30 test images stand in train too, with another label."""
    arrays = {}
    for seed, (split, count) in enumerate((("train", 60), ("val", 30), ("test", 30))):
        images, labels = digits(count, 2, seed)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    arrays["train_images"][:copied] = arrays["test_images"][:copied]
    arrays["train_labels"][:copied] = 1 - arrays["test_labels"][:copied]
    np.savez(path, **arrays)
    return path


def command(folder, path, **settings):
    given = {**SETTINGS, "train.epochs": 1, "model.weights": "none", "data.dir": path, **settings}
    return [
        "launch.py",
        f"--config={ROOT / 'configs' / 'finetune.py'}",
        f"--workdir={folder}",
        *(f"--config.{key}={value}" for key, value in given.items()),
    ]


@pytest.mark.usefixtures("small_runs")
def test_a_run_records_what_was_found(launch, tmp_path, capsys):
    path = write_set(tmp_path / "set.npz", 10)
    assert launch.run_command(command(tmp_path / "run", path)) == 0
    said = capsys.readouterr().out
    assert "audit: 10 images of test (33.33%) have a copy in an earlier split" in said
    audit = runs.read_json(tmp_path / "run" / "environment.json")["audit"]
    assert audit["copied"]["test"] == {"exact": 10, "near": 0, "share": 0.333333}
    assert audit["conflicts"] == 10
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Data audit</h2>" in page and "10 pairs of copies have different labels" in page
    assert "train/000000" in page and "Copies that the audit found" in page
    assert (tmp_path / "run" / "figures" / "audit.png").is_file()
    config = runs.read_json(tmp_path / "run" / "config.json")["data"]
    assert (config["audit"], config["audit_limit"]) == ("on", 0.5)


@pytest.mark.usefixtures("small_runs", "no_pictures_here")
def test_copies_above_the_limit_are_refused_before_anything_is_written(launch, tmp_path, capsys):
    path = write_set(tmp_path / "set.npz", 16)
    assert launch.run_command(command(tmp_path / "run", path)) == 2
    error = capsys.readouterr().err
    assert "53.33% of the images of test have a copy in an earlier split" in error
    assert "python -m medtl_jax.data audit" in error and "data.audit=off" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    raised = {"data.audit_limit": 0.6}
    assert launch.run_command(command(tmp_path / "raised", path, **raised)) == 0


@pytest.mark.usefixtures("small_runs", "no_pictures_here")
def test_an_audit_that_is_off_is_recorded(launch, tmp_path, capsys):
    path = write_set(tmp_path / "set.npz", 16)
    assert launch.run_command(command(tmp_path / "run", path, **{"data.audit": "off"})) == 0
    assert "audit: off (data.audit)" in capsys.readouterr().out
    assert runs.read_json(tmp_path / "run" / "config.json")["data"]["audit"] == "off"
    assert runs.read_json(tmp_path / "run" / "environment.json")["audit"] == "off"


@pytest.mark.usefixtures("small_runs", "no_pictures_here")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.audit": "maybe"}, "data.audit='maybe' is not known"),
        ({"data.audit_limit": 1.5}, "data.audit_limit=1.5 must be"),
    ],
)
def test_wrong_settings_are_refused(launch, tmp_path, capsys, settings, words):
    assert launch.run_command(command(tmp_path / "run", "none.npz", **settings)) == 2
    assert words in capsys.readouterr().err


def config_of(path, cache):
    return {
        "data": {"audit": "on", "audit_limit": 0.5, "name": "npz", "dir": str(path)},
        "transfer": {"cache_dir": str(cache)},
    }


@pytest.fixture
def counted(monkeypatch):
    """How many audits were made, each of which is worth keeping, in a process that had none."""
    made = []

    def count(*args):
        made.append(args)
        return whole(*args)

    whole = auditing.audit_dataset
    monkeypatch.setattr(auditing, "audit_dataset", count)
    monkeypatch.setattr(auditing, "_WORTH_KEEPING", 0.0)
    monkeypatch.setattr(auditing, "_of_this_process", {})
    return made


def test_an_audit_is_made_once_for_the_same_images(tmp_path, counted, monkeypatch):
    config = config_of(write_set(tmp_path / "set.npz", 5), tmp_path / "cache")
    console, read = Console(quiet=True), load_dataset(config["data"], 28)
    first = auditing.look(config, console, read)
    assert auditing.look(config, console, load_dataset(config["data"], 28)) == first
    assert len(counted) == 1
    # Another process finds it on disk; a damaged file is made anew, and so is another set's.
    monkeypatch.setattr(auditing, "_of_this_process", {})
    assert auditing.look(config, console, read) == first
    assert len(counted) == 1
    (kept,) = (tmp_path / "cache").glob("audit-*.json")
    for content in ("{", "[]", '{"version": 1}', '{"version": 1, "copied": 3}'):
        kept.write_text(content)
        monkeypatch.setattr(auditing, "_of_this_process", {})
        assert auditing.look(config, console, read) == first
    assert len(counted) == 5
    other = load_dataset(config_of(write_set(tmp_path / "b.npz", 6), "")["data"], 28)
    assert auditing.look(config, console, other)["conflicts"] == 6
    assert len(counted) == 6


def test_an_audit_that_cannot_be_kept_is_used_all_the_same(tmp_path, counted):
    (tmp_path / "cache").write_text("a file")
    config = config_of(write_set(tmp_path / "set.npz", 5), tmp_path / "cache")
    read = load_dataset(config["data"], 28)
    assert auditing.look(config, Console(quiet=True), read)["conflicts"] == 5


def test_the_limit_is_not_passed_by_a_share_equal_to_it(tmp_path):
    config = config_of(write_set(tmp_path / "set.npz", 15), tmp_path / "cache")
    read = load_dataset(config["data"], 28)
    auditing.check_audit(config, Console(quiet=True), read)
    config["data"]["audit_limit"] = 0.49
    with pytest.raises(UserError, match=r"50\.00% of the images of test"):
        auditing.check_audit(config, Console(quiet=True), read)
