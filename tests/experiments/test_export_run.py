"""A run exported: a process with jax and numpy alone gives the scores that the run wrote."""

import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import export

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
TINY = {
    "data.phantom.train": 48,
    "data.phantom.val": 100,
    "data.phantom.test": 400,
    "model.image_size": 32,
    "train.epochs": 1,
    "train.min_steps": 0,
    "data.batch_size": 16,
    "eval.batch_size": 64,
    "eval.resamples": 50,
}
# What a process says of itself once it has run the example.
ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
foreign = [name for name in ("flax", "medtl_jax", "experiments", "optax") if name in sys.modules]
assert not foreign, foreign
"""


def command(workdir, **settings):
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={workdir}", *keys]


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    small = {"model__name": "lenet5_bn", "model__weights": "none"}
    with jax.numpy_dtype_promotion("standard"):
        assert launch.run_command(command(folder, **small)) == 0
    return folder


@pytest.fixture(scope="module")
def exported(launch, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "network"
    with jax.numpy_dtype_promotion("standard"):
        asked = command(folder, experiment="export", eval__run=trained)
        assert launch.run_command(asked) == 0
    return folder


def images_of(trained):
    """The images of val and test, as the run read them, and what it predicted of them."""
    from medtl_jax.data.readers import load_dataset

    config = json.loads((trained / "config.json").read_text())
    dataset = load_dataset(config["data"], config["model"]["image_size"])
    with np.load(trained / "predictions.npz") as saved:
        names = [name for name in ("val", "test") if f"{name}_id" in saved]
        for name in names:
            assert np.array_equal(saved[f"{name}_id"], dataset.splits[name].ids)
        scores = np.concatenate([saved[f"{name}_score"] for name in names])
    return np.concatenate([np.asarray(dataset.splits[name].images) for name in names]), scores


def test_a_process_with_jax_and_numpy_alone_gives_the_run_s_scores(trained, exported, tmp_path):
    images, scores = images_of(trained)
    assert len(images) == 500
    assert images.dtype == np.uint8
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [
            *(sys.executable, "-c", ALONE, exported / export.EXAMPLE),
            *(tmp_path / "images.npy", tmp_path / "scores.npy"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), scores, atol=1e-5)


def test_the_card_says_what_the_file_is(trained, exported):
    card = json.loads((exported / export.CARD).read_text())
    content = (exported / export.PROGRAM).read_bytes()
    assert card["program_sha256"] == hashlib.sha256(content).hexdigest()
    assert card["input"]["shape"] == [64, 32, 32, 1]
    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    environment = json.loads((trained / "environment.json").read_text())
    assert card["task"] == environment["task"]
    assert card["parity"]["images"] == 100
    assert card["parity"]["largest_difference"] <= 1e-6
    assert {path.name for path in exported.iterdir()} >= {"config.json", "environment.json"}


def test_the_cpu_s_form_of_a_convolution_is_the_cpu_s_alone(exported):
    program = jax.export.deserialize(bytearray((exported / export.PROGRAM).read_bytes()))
    text = program.mlir_module()
    # Which form is taken is decided by the platform it runs on.
    assert "stablehlo.case" in text and "stablehlo.convolution" in text


def test_another_network_s_scores_leave_nothing_behind(
    launch, trained, tmp_path, monkeypatch, capsys
):
    made = export.export_scores

    def wrong(network, spec, variables, *others):
        return made(network, spec, jax.tree.map(lambda leaf: 1.1 * leaf, variables), *others)

    monkeypatch.setattr(export, "export_scores", wrong)
    folder = tmp_path / "wrong"
    with jax.numpy_dtype_promotion("standard"):
        asked = command(folder, experiment="export", eval__run=trained)
        assert launch.run_command(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the exported network's scores differ from the run's by" in line
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval__tta": 4}, "eval.tta"),
        ({"eval__run": "nowhere"}, "nowhere"),
        ({"model__name": "resnet18"}, "model.name"),
    ],
)
def test_what_cannot_be_exported_is_one_line(launch, trained, tmp_path, capsys, settings, said):
    folder = tmp_path / "out"
    asked = command(folder, **{"experiment": "export", "eval__run": trained, **settings})
    assert launch.run_command(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not folder.exists()


def test_an_exported_network_is_no_run_to_compare(exported, trained, capsys):
    from experiments import compare
    from medtl_jax.errors import UserError

    with pytest.raises(UserError, match="has an exported network and no predictions"):
        compare.read_run(exported, "exported", "test")
