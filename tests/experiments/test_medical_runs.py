"""A training on DICOM files through the command line, and predictions of DICOM and NIfTI files."""

import csv
import json
import pathlib

import jax
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
TINY = {
    "model.name": "lenet5",
    "model.weights": "none",
    "model.image_size": 32,
    "train.epochs": 1,
    "train.min_steps": 0,
    "data.batch_size": 4,
    "eval.batch_size": 4,
    "eval.resamples": 20,
}
SPLITS = {"train": 4, "val": 2, "test": 2}


def command(workdir, **settings) -> list[str]:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={workdir}", *keys]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """As in launch.py: optax mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> pathlib.Path:
    """Class folders of an MR image, as it is and upside down, each of another patient."""
    root = tmp_path_factory.mktemp("scans")
    scan = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    stored = scan.pixel_array
    scan.PatientName = "Secret^Name"
    for split, count in SPLITS.items():
        for label, pixels in (("up", stored), ("down", stored[::-1])):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                scan.PatientID = f"id-{split}-{label}-{number}"
                scan.PixelData = np.ascontiguousarray(pixels).tobytes()
                scan.save_as(root / split / label / f"{number}.dcm")
    return root


@pytest.fixture(scope="module")
def run(launch, no_pictures, scans, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {"data__name": "folder", "data__dir": scans, "data__window": "500,1200"}
    # All images of a class are one image.
    settings["data__audit"] = "off"
    assert launch.run_command(command(folder, **settings)) == 0
    return folder


def predict(launch, run, images, out, **settings):
    given = {"experiment": "predict", "eval__run": run, "data__dir": images, **settings}
    keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in given.items()]
    return launch.run_command(["launch.py", STUDY, f"--workdir={out}", *keys])


def table(folder) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_patients_are_in_the_run_and_their_names_are_not(run):
    with np.load(run / "predictions.npz") as found:
        assert "id-test-up-0" in found["test_patient"].tolist()
    for path in run.rglob("*"):
        assert path.is_dir() or b"Secret" not in path.read_bytes(), path


def test_predict_reads_as_the_run_did(launch, run, scans, tmp_path, capfd):
    image = scans / "test" / "up" / "0.dcm"
    assert predict(launch, run, image, tmp_path / "one") == 0
    assert "note: 1 of 1 images: DICOM by data.window=500,1200" in capfd.readouterr().out
    (row,) = table(tmp_path / "one")
    assert row["path"] == "0.dcm"
    with np.load(run / "predictions.npz") as found:
        at = found["test_id"].tolist().index("test/up/0.dcm")
        scores = found["test_score"][at]
    classes = [name for name in row if name not in ("path", "predicted")]
    np.testing.assert_allclose([float(row[name]) for name in classes], scores, atol=1e-5)
    assert predict(launch, run, image, tmp_path / "own", data__window="9000,10") == 0
    assert table(tmp_path / "own")[0] != row
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["data"]["window"] == "500,1200"


def test_predict_gives_a_row_to_every_slice(launch, run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    volume = np.arange(4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3) * 20
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "v.nii.gz")
    assert predict(launch, run, folder, tmp_path / "out") == 0
    assert [row["path"] for row in table(tmp_path / "out")] == [f"v.nii.gz#{k}" for k in range(3)]


def test_predict_refuses_a_file_without_pixels(launch, run, tmp_path, capfd):
    plan = get_testdata_file("rtplan.dcm", download=False)
    assert predict(launch, run, plan, tmp_path / "out") == 2
    said = capfd.readouterr().err
    assert "rtplan.dcm (a DICOM file without pixel data (RTPLAN))" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()
