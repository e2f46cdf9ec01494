"""The run folder: when it may be used, and that nothing half-written is left."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from medtl_jax import runs
from medtl_jax.errors import UserError

CONFIG = {
    "experiment": "finetune",
    "seed": 0,
    "data": {"dir": ""},
    "optim": {"low": {"lr": 0.1}, "name": "sgd"},
}
ENVIRONMENT = {"data_sha256": "aa", "weights_sha256": "bb", "commit": "c"}


def changed(**values):
    return {**CONFIG, **values}


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_new_or_an_empty_folder_is_free(tmp_path):
    runs.check_folder(tmp_path / "new", CONFIG)
    (tmp_path / "empty").mkdir()
    runs.check_folder(tmp_path / "empty", CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_file_or_a_foreign_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert error_of(runs.check_folder, file, CONFIG).endswith("is a file; name a new folder")
    message = error_of(runs.check_folder, tmp_path, CONFIG)
    assert "is not empty and no run folder; name a new folder" in message


def test_a_folder_inside_the_data_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    inside = changed(data={"name": "folder", "dir": str(tmp_path / "set")})
    message = error_of(runs.check_folder, tmp_path / "set" / "deep" / "run", inside)
    assert f"lies inside data.dir={tmp_path / 'set'}; name a folder elsewhere" in message
    runs.check_folder(tmp_path / "set-run", inside)
    downloads = changed(experiment="finetune", data={"name": "medmnist/x", "dir": str(tmp_path)})
    runs.check_folder(tmp_path / "set-run", downloads)


def test_a_second_holder_is_refused_until_the_first_is_gone(tmp_path):
    with runs.hold(tmp_path):
        assert "another process is at work on this run" in error_of(hold_once, tmp_path)
    hold_once(tmp_path)


def hold_once(folder):
    with runs.hold(folder):
        pass


def test_open_writes_config_and_environment(tmp_path):
    folder = tmp_path / "deep" / "run"
    runs.open_folder(folder, CONFIG, ENVIRONMENT)
    assert {path.name for path in folder.iterdir()} == {runs.CONFIG, runs.ENVIRONMENT}
    assert json.loads((folder / runs.CONFIG).read_text()) == CONFIG
    assert runs.read_json(folder / runs.ENVIRONMENT) == ENVIRONMENT
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_open_takes_an_empty_folder(tmp_path):
    (tmp_path / "run").mkdir()
    runs.open_folder(tmp_path / "run", CONFIG, ENVIRONMENT)
    assert (tmp_path / "run" / runs.CONFIG).is_file()


def test_the_same_run_may_continue_after_a_new_commit(tmp_path):
    folder = tmp_path / "run"
    runs.open_folder(folder, CONFIG, ENVIRONMENT)
    (folder / "metrics.jsonl").write_text("{}\n")
    runs.open_folder(folder, CONFIG, {**ENVIRONMENT, "commit": "d"})
    assert (folder / "metrics.jsonl").read_text() == "{}\n"
    assert runs.read_json(folder / runs.ENVIRONMENT)["commit"] == "c"


def test_another_config_is_named_key_by_key(tmp_path):
    folder = tmp_path / "run"
    runs.open_folder(folder, CONFIG, ENVIRONMENT)
    other = changed(optim={"low": {"lr": 0.2}, "name": "sgd"})
    assert error_of(runs.open_folder, folder, other, ENVIRONMENT) == (
        f"--workdir={folder} holds a run of another config: optim.low.lr (0.1 there, 0.2 now); "
        "name another folder"
    )
    message = error_of(runs.check_folder, folder, {"a": 1, "b": 2, "data": {"dir": ""}})
    assert "a (None there, 1 now), b (None there, 2 now), experiment ('finetune' there" in message
    assert " and more; name another folder" in message


@pytest.mark.parametrize(("key", "what"), [("data_sha256", "data"), ("weights_sha256", "weights")])
def test_other_data_or_weights_are_refused(tmp_path, key, what):
    folder = tmp_path / "run"
    runs.open_folder(folder, CONFIG, ENVIRONMENT)
    message = error_of(runs.open_folder, folder, CONFIG, {**ENVIRONMENT, key: "zz"})
    assert f"was begun with other {what} ({key} differs); name another folder" in message


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    message = error_of(runs.open_folder, tmp_path / "file" / "run", CONFIG, ENVIRONMENT)
    assert "cannot be made" in message and message.startswith("--workdir=")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_default_folder_is_a_function_of_the_config():
    # The hash must not change from one version to the next: the same command finds its run.
    assert str(runs.default_folder(CONFIG)) == "runs/finetune-dcff76c1"
    assert runs.default_folder(changed(seed=1)) != runs.default_folder(CONFIG)
    assert runs.default_folder(dict(reversed(CONFIG.items()))) == runs.default_folder(CONFIG)
    # In whichever program it is computed, and with the hash of a config without that key.
    programs = [changed(train={"epochs": 2, "program": name}) for name in ("auto", "turns")]
    assert {runs.default_folder(config) for config in programs} == {
        runs.default_folder(changed(train={"epochs": 2}))
    }


def test_flat_config_by_hand():
    assert runs.flat_config(CONFIG) == {
        "experiment": "finetune",
        "seed": 0,
        "data.dir": "",
        "optim.low.lr": 0.1,
        "optim.name": "sgd",
    }


def test_a_run_is_finished_by_its_metrics(tmp_path):
    assert not runs.is_finished(tmp_path)
    (tmp_path / "metrics.json.part").write_text("{")
    assert not runs.is_finished(tmp_path)
    runs.write_json(tmp_path / runs.METRICS, {})
    assert runs.is_finished(tmp_path)


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": object()}])
def test_a_failed_write_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "metrics.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises((ValueError, TypeError)):
        runs.write_json(path, value)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert runs.read_json(path) == {"a": 1}


def test_a_missing_file_means_no_run_folder(tmp_path):
    message = error_of(runs.read_json, tmp_path / runs.CONFIG)
    assert message == f"{tmp_path} is no run folder: it has no config.json"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null null", b"1" * 5_000],
    ids=["empty", "cut", "not text", "deep", "two values", "long number"],
)
def test_garbage_is_one_line(tmp_path, content):
    path = tmp_path / runs.CONFIG
    path.write_bytes(content)
    assert error_of(runs.read_json, path).startswith(f"{path} cannot be read (")


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / runs.CONFIG
    path.write_bytes(b" " * 10_000_001)
    message = error_of(runs.read_json, path)
    assert "is larger than 10000000 bytes: not written by medtl_jax" in message
    assert "larger than 5 bytes" in error_of(runs.read_json, path, 5)


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path):
    assert "cannot be read (IsADirectoryError)" in error_of(runs.read_json, tmp_path)


@pytest.mark.parametrize("content", ["[1, 2]", "7", '"text"', "null"])
def test_a_config_that_is_no_mapping_is_one_line(tmp_path, content):
    (tmp_path / runs.CONFIG).write_text(content)
    (tmp_path / runs.ENVIRONMENT).write_text(content)
    assert "holds no mapping" in error_of(runs.check_folder, tmp_path, CONFIG)
    (tmp_path / runs.CONFIG).write_text(json.dumps(CONFIG))
    assert "holds no mapping" in error_of(runs.open_folder, tmp_path, CONFIG, ENVIRONMENT)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
).filter(lambda value: "inf" not in repr(value))


@hypothesis.given(json_values)
@hypothesis.settings(max_examples=50)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    runs.write_json(path, {"value": value})
    assert runs.read_json(path) == {"value": value}


def test_the_environment_names_versions_and_devices():
    found = runs.describe_environment()
    assert found["backend"] == "cpu" and len(found["devices"]) == 4
    assert found["packages"].keys() >= {"jax", "flax", "optax", "numpy"}
    assert found["commit"]
    json.dumps(found)
