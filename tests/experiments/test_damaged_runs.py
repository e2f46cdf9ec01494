"""A damaged run of an ablation: one line that names its folder and what to do."""

import json
import pathlib
import shutil

import digit_runs
import pytest

from medtl_jax import runs

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`command(folder)`: an ablation of two runs."""
    data = digit_runs.write_digits(tmp_path_factory.mktemp("data") / "digits.npz", 3, 0)
    settings = {
        **digit_runs.SETTINGS,
        "experiment": "ablation",
        "model.weights": "none",
        "data.dir": data,
        "train.devices": 1,
        "train.epochs": 1,
        "ablation.axes": json.dumps({"optim.high.lr": [0.002, 0.02]}),
        "ablation.seeds": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    study = f"--config={ROOT / 'configs' / 'default.py'}"
    return lambda folder: ["launch.py", study, *flags, f"--workdir={folder}"]


@pytest.fixture(scope="module")
def finished(launch, small_runs, no_pictures, command, tmp_path_factory):
    """The folder of the ablation."""
    folder = tmp_path_factory.mktemp("finished") / "study"
    assert launch.run_command(command(folder)) == 0
    return folder


@pytest.mark.parametrize("name", ["metrics.json", "predictions.npz"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_run_is_one_line_with_its_folder(
    finished, launch, command, tmp_path, capsys, name, place
):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    (folder / "metrics.json").unlink()
    path = sorted((folder / "cells").iterdir())[place]
    file = path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert launch.run_command(command(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file} cannot be read")
    assert line.endswith(f"delete {path} to have the run made again")
    # What it says is enough.
    shutil.rmtree(path)
    assert launch.run_command(command(folder)) == 0
    assert (folder / "ablation.md").is_file() and runs.is_finished(path)


@pytest.mark.parametrize("experiment", ["evaluate", "predict"])
def test_an_ablation_is_no_run_to_evaluate_or_to_predict_with(
    finished, launch, tmp_path, capsys, experiment
):
    study = f"--config={ROOT / 'configs' / 'default.py'}"
    flags = [f"--config.experiment={experiment}", f"--config.eval.run={finished}"]
    new = tmp_path / "new"
    assert launch.run_command(["launch.py", study, *flags, f"--workdir={new}"]) == 2
    first = sorted((finished / "cells").iterdir())[0]
    assert capsys.readouterr().err == (
        f"error: {finished} is an ablation: name one of its runs, such as {first}\n"
    )
    assert not new.exists()
