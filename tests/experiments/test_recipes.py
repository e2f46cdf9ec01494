"""The recipes: fifteen configs that load in both forms, and three that run on their stand-ins."""

import ast
import importlib
import json
import re

import jax
import numpy as np
import pytest
from digit_runs import ROOT

from configs import default
from medtl_jax import runs

FOLDER = ROOT / "configs" / "recipes"
# What each header must say of its own set.
SETS = {
    "retinopathy_features": (1, "APTOS 2019"),
    "nodule_googlenet": (2, "LUNA16"),
    "retinopathy_augmentation": (3, "APTOS 2019"),
    "skin_ensemble": (4, "HAM10000"),
    "vessels_adversarial": (5, "DRIVE"),
    "bone_age": (6, "RSNA"),
    "cardiac_elastic": (7, "ACDC"),
    "tumour_ensemble": (8, "BraTS"),
    "skin_adversarial": (9, "HAM10000"),
    "chestxray8": (10, "ChestX-ray8"),
    "lung_contrast": (11, "IQ-OTH/NCCD"),
    "vessels_geometry": (12, "DRIVE"),
    "prostate_vgg": (13, "PROSTATEx"),
    "dental_adversarial": (14, "DENTEX"),
    "efficient": (15, "Kermany"),
}
FILES = (
    "chest_xray_kermany224/labels.csv",
    "chest_xray_nih224/labels.csv",
    "nuclei_dsb2018_256/labels.csv",
    "chase_db1/labels.csv",
    "bccd/labels.csv",
    "medmnist/breastmnist.npz",
)
PUBLISHED = {"retinopathy_features", "retinopathy_augmentation", "skin_ensemble", "bone_age"}
# For colour images, with a grey stand-in.
GREY = {"skin_ensemble", "skin_adversarial"}
# A few seconds; `RUN` says what the run must measure.
TINY = {
    "model.name": "lenet5_bn",
    "model.weights": "none",
    "model.image_size": 32,
    "data.train_fraction": 0.2,
    "train.epochs": 1,
    "train.min_steps": 0,
    "train.devices": 1,
    "eval.resamples": 20,
}
RUN = {"lung_contrast": "auc", "retinopathy_augmentation": "auc", "cardiac_elastic": "dice"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder in which every stand-in has a file of its name."""
    root = tmp_path_factory.mktemp("sets")
    for name in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


def header(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))


def test_there_are_fifteen_each_for_a_system_of_its_own():
    found = {path.stem for path in FOLDER.glob("*.py")} - {"stand_ins"}
    assert found == SETS.keys()
    assert sorted(number for number, _ in SETS.values()) == list(range(1, 16))


@pytest.mark.parametrize("name", SETS)
def test_a_header_names_system_set_and_both_commands(name):
    number, published = SETS[name]
    text = header(name)
    assert f"\nSystem {number} of the survey " in text
    said = {part.split(":")[0] for part in re.split(r"\n(?=[A-Z][A-Za-z -]+: )", text)[1:]}
    assert {"Command", "Stand-in", "Data", "Stand-in set", "Weights"} <= said
    assert published in text.split("\nData: ")[1].split("\nStand-in set: ")[0]
    study = f"python launch.py --config=configs/recipes/{name}.py"
    assert f"\nCommand: {study} \\\n    --config.data.dir=" in text
    assert f"\nStand-in: {study}:SETS\n" in text
    keys = runs.flat_config(default.get_config().to_dict())
    named = set(re.findall(r"--config\.([a-z_.]+)=", text))
    assert named and named <= keys.keys()
    code = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(code) if isinstance(node, ast.For | ast.While)]


def resolved(launch, study: str) -> dict:
    """The config of a study as its experiment would take it, all but the data looked at."""
    from experiments.settings import check_ranges
    from experiments.strategies import expand

    config = expand(launch._load_study(study).to_dict())
    check_ranges(config)
    return importlib.import_module(f"experiments.{config['experiment']}").resolve(config, set())


@pytest.mark.parametrize("name", SETS)
def test_a_recipe_loads_in_both_forms(launch, sets, name):
    path = FOLDER / f"{name}.py"
    own, other = resolved(launch, str(path)), resolved(launch, f"{path}:{sets}")
    assert own["data"]["dir"] == ""
    assert other["data"]["dir"] in [str(sets / file) for file in FILES]
    if name in PUBLISHED:
        assert own["data"]["csv_path_column"] in ("id_code", "image_id", "id")
        assert own["data"]["csv_split_column"] == "" and own["data"]["csv_path_format"] != "{}"
    # The stand-in changes which images are read, and of what is done with them at most the colours.
    flat, stood = runs.flat_config(own), runs.flat_config(other)
    changed = {key for key in flat if flat[key] != stood[key]}
    parts = ("data.", "domain.target.", *(("augment.",) if name in GREY else ()))
    assert changed and all(key.startswith(parts) for key in changed)
    assert flat["data.batch_size"] == stood["data.batch_size"]
    wanted = flat["experiment"] == "adapt"
    assert bool(stood["domain.target.dir"]) == bool(flat["domain.target.name"]) == wanted


def test_all_stand_ins_are_named_where_they_are_explained():
    text = header("stand_ins")
    assert all(part in text for file in FILES for part in file.split("/"))


@pytest.mark.parametrize("name", SETS)
def test_a_stand_in_that_is_not_there_is_one_line(launch, tmp_path, capfd, name):
    study = f"--config={FOLDER / name}.py:{tmp_path / 'none'}"
    workdir = tmp_path / "run"
    assert launch.run_command(["launch.py", study, f"--workdir={workdir}"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --config=") and error.count("\n") == 1
    assert "is not there: what follows the colon is the folder of the stand-in sets" in error
    assert not workdir.exists()


def test_a_recipe_without_data_says_what_is_missing(launch, tmp_path, capfd):
    study = [f"--config={FOLDER / 'efficient.py'}", f"--workdir={tmp_path / 'run'}"]
    assert launch.run_command(["launch.py", *study]) == 2
    assert "data.dir is empty" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_recipe_runs_on_its_stand_in(launch, no_pictures_here, shared, tmp_path, name):
    keys = [f"--config.{key}={value}" for key, value in TINY.items()]
    study = [f"--config={FOLDER / name}.py:{shared / 'data'}", f"--workdir={tmp_path / 'run'}"]
    with jax.numpy_dtype_promotion("standard"):
        assert launch.run_command(["launch.py", *study, *keys]) == 0
    entry = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"][RUN[name]]
    low, high = entry["ci95"]
    assert low <= entry["value"] <= high and np.isfinite([low, high]).all() and entry["n"] > 50
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert f"{name}.py:{shared / 'data'}" in environment["command"]
