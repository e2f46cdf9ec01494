"""One tiny run, and what evaluate and predict make of it; run folders that come from anybody."""

import csv
import errno
import json
import math
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss

from medtl_jax import runs
from medtl_jax.data.phantom import CLASSES, make_phantom

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
TINY = {
    "data.phantom.train": 48,
    "data.phantom.val": 16,
    "data.phantom.test": 16,
    "model.image_size": 32,
    "train.epochs": 1,
    "train.min_steps": 0,
    "data.batch_size": 16,
    "eval.batch_size": 16,
    "eval.resamples": 50,
}


def command(workdir, **settings) -> list[str]:
    """The command line of the tiny study; `a__b=value` sets `a.b`."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={workdir}", *keys]


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory) -> pathlib.Path:
    """The folder of the tiny run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    # A network of five layers: compilation is most of the time.
    small = {"model__name": "lenet5_bn", "model__weights": "none"}
    with jax.numpy_dtype_promotion("standard"):
        assert launch.run_command(command(folder, **small)) == 0
    return folder


@pytest.fixture(scope="module")
def grey_set(tmp_path_factory) -> pathlib.Path:
    """The phantom's test split as `test/<class>/<number in the split>.png`."""
    return write_set(tmp_path_factory.mktemp("grey"), lambda grey: grey)


@pytest.fixture(scope="module")
def colour_set(tmp_path_factory) -> pathlib.Path:
    """The same in colours whose luma is the grey value."""
    return write_set(tmp_path_factory.mktemp("colour"), tint)


def tint(grey: np.ndarray) -> np.ndarray:
    """RGB `[h, w, 3]` of ITU-R 601 luma `grey`: 0.299 * 2 - 0.587 is 0.011, less than half."""
    shift = np.array([2, -1, 0]) * ((grey > 0) & (grey < 254))[..., None]
    return (grey[..., None].astype(int) + shift).astype(np.uint8)


def write_set(root: pathlib.Path, colour) -> pathlib.Path:
    split = make_phantom(32, train=48, val=16, test=16, splits=("test",)).splits["test"]
    for number, (image, label) in enumerate(zip(split.images, split.target, strict=True)):
        folder = root / "test" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colour(image[..., 0])).save(folder / f"{number:02}.png")
    return root


def read_table(folder: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def values(metrics: dict) -> dict[str, float]:
    return {name: found["value"] for name, found in metrics.items()}


def snapshot(*folders: pathlib.Path) -> dict[str, bytes | None]:
    """Every path below `folders`, hidden ones too, with the content of the files."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.fixture
def refuse(launch, trained, tmp_path, capfd):
    """`refuse(arguments) -> message`: exit code 2, one line, nothing written."""

    def refusal(arguments: list[str]) -> str:
        before = snapshot(tmp_path, trained)
        capfd.readouterr()
        assert launch.run_command(arguments) == 2
        output, error = capfd.readouterr()
        assert snapshot(tmp_path, trained) == before
        assert error.startswith("error: ") and error.endswith("\n"), error
        assert error.count("\n") == 1 and "Traceback" not in output + error
        return error.removeprefix("error: ").rstrip()

    return refusal


# ---- evaluate ----------------------------------------------------------------------------------


def test_evaluate_agrees_with_the_epoch_that_was_chosen(launch, trained, tmp_path):
    settings = {"experiment": "evaluate", "eval__run": trained, "eval__splits": "val"}
    assert launch.run_command(command(tmp_path / "val", **settings)) == 0
    (record,) = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    metrics = runs.read_json(tmp_path / "val" / "metrics.json")
    assert metrics.keys() == {"val"}
    assert metrics["val"]["accuracy"]["value"] == record["val_accuracy"]
    assert metrics["val"]["auc"]["value"] == pytest.approx(record["val_auc"], abs=1e-9)
    with np.load(tmp_path / "val" / "predictions.npz") as found:
        target, score = found["val_target"], found["val_score"]
    assert accuracy_score(target, score.argmax(1)) == record["val_accuracy"]
    # float32 rows do not add up to one exactly, which scikit-learn would warn of.
    exact = score.astype(np.float64) / score.sum(1, dtype=np.float64, keepdims=True)
    loss = log_loss(target, exact, labels=range(len(CLASSES)))
    assert loss == pytest.approx(record["val_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", ["grey_set", "colour_set"])
def test_evaluate_scores_files_as_their_source(
    launch, trained, tmp_path, request, kind, no_pictures_here
):
    root = request.getfixturevalue(kind)
    arguments = command(
        tmp_path / "files",
        experiment="evaluate",
        eval__run=trained,
        data__name="folder",
        data__dir=root,
    )
    assert launch.run_command(arguments) == 0
    own = values(runs.read_json(trained / "metrics.json")["test"])
    found = values(runs.read_json(tmp_path / "files" / "metrics.json")["test"])
    assert len(own) > 5 and found == pytest.approx(own, abs=1e-9, nan_ok=True)
    with (
        np.load(trained / "predictions.npz") as theirs,
        np.load(tmp_path / "files" / "predictions.npz") as ours,
    ):
        numbers = [int(pathlib.PurePosixPath(name).stem) for name in ours["test_id"]]
        assert sorted(numbers) == list(range(16))
        np.testing.assert_array_equal(ours["test_target"], theirs["test_target"][numbers])
        np.testing.assert_allclose(ours["test_score"], theirs["test_score"][numbers], atol=1e-6)
        assert not set(ours["test_id"]) & set(theirs["test_id"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__image_size": 64}, "model.image_size=64 has no effect: the model of"),
        # That of the study's file, but asked for all the same.
        ({"model__image_size": 128}, "model.image_size=128 has no effect: the model of"),
        (
            {"eval__splits": "test,val", "data__phantom__val": 12},
            "was trained on: that run had 16; leave it out",
        ),
        ({"eval__splits": "train", "data__seed_split": 1}, "data.seed_split=1 could score images"),
        ({"eval__splits": "val,val"}, "eval.splits='val,val': name some of train,val,test"),
        ({"eval__splits": "tests"}, "eval.splits='tests': name some of train,val,test"),
        ({"eval__run": ""}, "eval.run is empty"),
        ({"eval__run": "gone"}, "gone is no run folder: it has no config.json"),
        ({"eval__batch_size": 6}, "eval.batch_size=6 must be a positive multiple of the 4"),
    ],
)
def test_evaluate_refuses(refuse, trained, tmp_path, settings, words):
    settings = {"experiment": "evaluate", "eval__run": trained, **settings}
    assert words in refuse(command(tmp_path / "new", **settings))


# ---- predict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grey_set", "colour_set"])
def test_predict_gives_the_probabilities_of_the_run(launch, trained, tmp_path, request, kind):
    root = request.getfixturevalue(kind)
    settings = {"experiment": "predict", "eval__run": trained, "data__dir": root}
    assert launch.run_command(command(tmp_path / "csv", **settings)) == 0
    header, rows = read_table(tmp_path / "csv")
    assert header == ["path", "predicted", *CLASSES]
    paths = [row[0] for row in rows]
    assert paths == sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    score = np.array([row[2:] for row in rows], float)
    with np.load(trained / "predictions.npz") as found:
        own = found["test_score"][[int(pathlib.PurePosixPath(path).stem) for path in paths]]
    np.testing.assert_allclose(score, own, rtol=0, atol=1e-6)
    assert [row[1] for row in rows] == [CLASSES[index] for index in own.argmax(1)]
    # Different images have different rows, so the order has been checked too.
    assert len(np.unique(score, axis=0)) == 16


def test_predict_one_image_and_again(launch, refuse, trained, grey_set, tmp_path):
    image = tmp_path / "one.png"
    shutil.copy(next(grey_set.rglob("03.png")), image)
    again = command(tmp_path / "csv", experiment="predict", eval__run=trained, data__dir=image)
    assert launch.run_command(again) == 0
    _, ((path, _, *row),) = read_table(tmp_path / "csv")
    with np.load(trained / "predictions.npz") as found:
        np.testing.assert_allclose(np.array(row, float), found["test_score"][3], rtol=0, atol=1e-6)
    assert path == "one.png"

    renamed = image.rename(tmp_path / "two.png")
    settings = {"experiment": "predict", "eval__run": trained, "data__dir": renamed}
    other = command(tmp_path / "csv", **settings)
    assert "holds a run of another config: data.dir" in refuse(other)
    renamed.rename(image)

    first = snapshot(tmp_path)
    (tmp_path / "csv" / "predictions.csv").unlink()
    assert launch.run_command(again) == 0
    assert snapshot(tmp_path) == first
    with runs.hold(tmp_path / "csv"):
        assert "another process is at work on this run" in refuse(again)
    shutil.copy(next(grey_set.rglob("04.png")), image)
    assert "was begun with other data (data_sha256 differs)" in refuse(again)


def test_predict_refuses_images_it_cannot_have(refuse, trained, tmp_path):
    def predict(path, workdir="new"):
        settings = {"experiment": "predict", "eval__run": trained, "data__dir": path}
        return refuse(command(tmp_path / workdir, **settings))

    images = tmp_path / "images"
    images.mkdir()
    assert "data.dir is empty" in predict("")
    assert f"no such file or folder: {tmp_path / 'gone'}" in predict(tmp_path / "gone")
    (images / "notes.txt").write_text("none")
    assert str(images) in predict(images)
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    message = predict(images)
    assert "1 of 1 images cannot be read" in message and "broken.png" in message
    assert f"lies inside data.dir={images}" in predict(images, workdir="images/new")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 on this system")
def test_predict_refuses_a_name_it_cannot_write(refuse, trained, grey_set, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(next(grey_set.rglob("03.png")), tmp_path / "images" / os.fsdecode(b"\xff.png"))
    settings = {"experiment": "predict", "eval__run": trained, "data__dir": tmp_path / "images"}
    message = refuse(command(tmp_path / "new", **settings))
    assert message.endswith("the file name '\\udcff.png' is not UTF-8; rename it")


# ---- run folders from anybody ------------------------------------------------------------------


def change(path: pathlib.Path, edit) -> None:
    """Rewrites a JSON file: `edit` changes the value, or returns another."""
    value = json.loads(path.read_text())
    edited = edit(value)
    path.write_text(json.dumps(value if edited is None else edited))


def setter(*keys, value):
    """An edit that sets the nested key."""

    def edit(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return edit


def dotted(config):
    config["model.name"] = config["model"].pop("name")


def nested(config):
    for _ in range(900):
        config = config.setdefault("model", {})


def deep_value(config):
    config["seed"] = inner = {}
    for _ in range(900):
        inner["a"] = inner = {}


CONFIGS = {
    "a list": (lambda config: [1], "holds no mapping"),
    "a key less": (lambda config: config["train"].pop("select") and None, "lacks the key"),
    "a key more": (setter("train", "fast", value=1), "has the unknown key train.fast"),
    "a first key less": (
        lambda config: config["augment"].pop("flip_horizontal") and None,
        "lacks the key augment.flip_horizontal",
    ),
    "an added section spoilt": (setter("domain", value="usps"), "domain='usps' must be a section"),
    "a dotted key": (dotted, "has the unknown key model.name"),
    "no section": (setter("model", value="resnet"), "model='resnet' must be a section of keys"),
    "deep": (nested, "has the unknown key model.model"),
    "deep value": (deep_value, "seed={'a': {'a':"),
    "wrong type": (setter("model", "name", value=3), "model.name=3 must be of the type of"),
    "unknown network": (setter("model", "name", value="resnet19"), "'resnet19'"),
    "huge image": (setter("model", "image_size", value=10**30), "takes 16 to 1024 pixels"),
    "huge depth": (setter("data", "bit_depth", value=10**30), "at most 16"),
    "infinite rate": (setter("optim", "low", "lr", value=float("inf")), "must be a finite number"),
    "unknown selection": (
        setter("train", "select", value="dice"),
        "train.select='dice' is none",
    ),
}


def as_of_an_earlier_version(config):
    """Without the keys that came with augmentation, adaptation and their studies."""
    for section in ("domain", "adapt", "ablation"):
        config.pop(section, None)
    config["model"].pop("contrast")
    config["optim"].pop("discriminator")
    first = ("flip_horizontal", "flip_vertical", "shift", "brightness", "contrast")
    config["augment"] = {name: config["augment"][name] for name in first}
    for key in ("tta", "corruptions"):
        config["eval"].pop(key)


def test_a_run_of_an_earlier_version_is_used_as_it_was(
    launch, trained, copied, grey_set, tmp_path, no_pictures_here
):
    change(copied / "config.json", as_of_an_earlier_version)
    change(
        copied / "environment.json", lambda tree: tree["weights"]["input"].pop("contrast") and None
    )
    found = []
    for name, folder in (("now", trained), ("then", copied)):
        asked = {"experiment": "predict", "eval__run": folder, "data__dir": grey_set}
        assert launch.run_command(command(tmp_path / f"csv {name}", **asked)) == 0
        asked = {"experiment": "evaluate", "eval__run": folder}
        assert launch.run_command(command(tmp_path / name, **asked)) == 0
        found.append((read_table(tmp_path / f"csv {name}"), read_metrics(tmp_path / name)))
    assert found[0] == found[1]


def read_metrics(folder: pathlib.Path) -> dict:
    return runs.read_json(folder / "metrics.json")


@pytest.fixture
def copied(trained, tmp_path) -> pathlib.Path:
    """A copy of the run, to be spoilt."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def refuse_run(refuse, copied, grey_set, tmp_path):
    """`refuse_run() -> message` of predict with the spoilt copy."""

    def refusal(**settings) -> str:
        given = {"experiment": "predict", "eval__run": copied, "data__dir": grey_set, **settings}
        # Unsaid, so that the run's own image size counts and not the 128 of the study.
        arguments = command(tmp_path / "new", **given)
        return refuse([text for text in arguments if "model.image_size" not in text])

    return refusal


@pytest.mark.parametrize(("edit", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_spoilt_config_is_one_line(refuse_run, copied, edit, words):
    change(copied / "config.json", edit)
    assert words in refuse_run()


@pytest.mark.parametrize("place", ["\0", "x" * 5000])
def test_a_run_on_data_of_no_place_is_on_other_data(
    launch, copied, tmp_path, place, no_pictures_here
):
    change(copied / "config.json", setter("data", "name", value="folder"))
    change(copied / "config.json", setter("data", "dir", value=place))
    change(copied / "config.json", setter("data", "phantom", "val", value=12))
    settings = {"experiment": "evaluate", "eval__run": copied, "eval__splits": "val"}
    assert launch.run_command(command(tmp_path / "new", **settings)) == 0
    assert runs.read_json(tmp_path / "new" / "metrics.json")["val"]["accuracy"]["n"] == 16


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b"", b'{"a":' * 100_000])
def test_a_config_that_is_no_json_is_one_line(refuse_run, copied, text):
    (copied / "config.json").write_bytes(text)
    assert "config.json cannot be read" in refuse_run()
    assert "config.json cannot be read" in refuse_run(experiment="evaluate")


ENVIRONMENTS = {
    "text": setter("task", "classes", value="normal"),
    "one class": setter("task", "classes", value=["normal"]),
    "twice": setter("task", "classes", value=["a", "b", "c", "a"]),
    "numbers": setter("task", "classes", value=[1, 2, 3, 4]),
    "no Unicode": setter("task", "classes", value=["a", "b", "c", "\ud800"]),
    "another task": setter("task", "name", value="detect"),
    "no task": lambda environment: environment.pop("task") and None,
    "scales": setter("task", "mean", value=[0.0]),
    "seven channels": setter("data", "channels", value=7),
    "real channels": setter("data", "channels", value=1.0),
    "true channels": setter("data", "channels", value=True),
    "weights": setter("weights", value="imagenet"),
    "weights' sha256": setter("weights", "sha256", value=None),
    "no data": lambda environment: environment.pop("data") and None,
}


@pytest.mark.parametrize("edit", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_spoilt_environment_is_one_line(refuse_run, copied, edit):
    change(copied / "environment.json", edit)
    path = copied / "environment.json"
    assert refuse_run() == f"{path} was not written by a training run of this version"


def test_classes_of_another_number_do_not_fit(refuse_run, copied):
    change(copied / "environment.json", setter("task", "classes", value=["a", "b", "c"]))
    assert "does not fit this model and config" in refuse_run()


CALIBRATIONS = {
    "a list": (lambda card: [1], "holds no mapping"),
    "a key less": (lambda card: card.pop("thresholds") and None, "want the keys"),
    "fitted on test": (setter("fitted_on", value="test"), "want fitted_on to be 'val'"),
    "no temperature": (setter("temperature", value=[]), "has 1 temperatures"),
    "a temperature of NaN": (setter("temperature", value=[math.nan]), "must be numbers in"),
    "a temperature of 0": (setter("temperature", value=[0]), "must be numbers in"),
    "no threshold": (setter("thresholds", "cyst", value={}), "want the thresholds youden"),
    "other classes": (lambda card: card["thresholds"].pop("cyst") and None, "run's classes"),
    "a threshold of 2": (setter("thresholds", "cyst", "youden", value=2), "be probabilities"),
    "a sensitivity of 2": (setter("target_sensitivity", value=2), "must lie in 0 < s <= 1"),
    "a reason for nothing": (setter("reasons", "youden/polyp", value="none"), "reasons name 1"),
}


@pytest.mark.parametrize(("edit", "words"), CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_a_spoilt_calibration_is_one_line(refuse_run, copied, edit, words):
    path = copied / "calibration.json"
    change(path, edit)
    message = refuse_run(experiment="evaluate", data__name="phantom", data__dir="")
    assert message.startswith(str(path)) and words in message, message


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b"", b"[" * 100_000])
def test_a_calibration_that_is_no_json_is_one_line(refuse_run, copied, text):
    (copied / "calibration.json").write_bytes(text)
    message = refuse_run(experiment="evaluate", data__name="phantom", data__dir="")
    assert "calibration.json cannot be read" in message


def test_evaluate_applies_the_calibration_of_the_run(launch, copied, tmp_path, no_pictures_here):
    def edit(card):
        card["temperature"], card["thresholds"]["cyst"]["youden"] = [4.0], 0.3
        for name in ("temperature", "youden/cyst"):
            card["reasons"].pop(name, None)

    change(copied / "calibration.json", edit)
    settings = {"experiment": "evaluate", "eval__run": copied}
    assert launch.run_command(command(tmp_path / "new", **settings)) == 0
    found = values(runs.read_json(tmp_path / "new" / "metrics.json")["test"])
    with np.load(tmp_path / "new" / "predictions.npz") as arrays:
        target, score = arrays["test_target"], arrays["test_score"].astype(np.float64)
    cooled = score**0.25
    cooled /= cooled.sum(1, keepdims=True)
    loss = log_loss(target, cooled, labels=range(len(CLASSES)))
    assert found["nll_calibrated"] == pytest.approx(loss, abs=1e-6)
    assert abs(found["nll_calibrated"] - found["nll"]) > 1e-4
    cyst, called = target == CLASSES.index("cyst"), score[:, CLASSES.index("cyst")] >= 0.3
    assert found["recall@youden/cyst"] == called[cyst].mean()
    assert found["specificity@youden/cyst"] == (~called[~cyst]).mean()
    # Without it there is nothing to apply.
    (copied / "calibration.json").unlink()
    assert launch.run_command(command(tmp_path / "none", **settings)) == 0
    plain = values(runs.read_json(tmp_path / "none" / "metrics.json")["test"])
    assert plain == {k: v for k, v in found.items() if "@" not in k and "_calibrated" not in k}


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("checkpoints", "saved no checkpoint"),
        ("checkpoints/last", "checkpoint"),
        ("checkpoints/best", "checkpoint"),
        ("checkpoints/last/1/history", "checkpoint"),
        ("checkpoints/best/1/tree/_METADATA", "checkpoint"),
        ("environment.json", "it has no environment.json"),
        ("config.json", "it has no config.json"),
    ],
)
def test_what_is_gone_is_named(refuse_run, copied, gone, words):
    path = copied / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refuse_run()
    assert words in message and str(copied) in message


# ---- before a training, and a full disk --------------------------------------------------------


def test_the_defaults_of_the_network_are_written_out(launch):
    from configs import default
    from experiments.finetune import resolve

    config = default.get_config().to_dict()
    assert config["transfer"]["groups"] == {"frozen": "", "low": "", "high": ""}
    resolved = resolve(config)
    # Half of the seven stages, rounded down, with the stem; EfficientNet drops 0.2 before the head.
    groups = {
        "frozen": "stem,stage1,stage2,stage3",
        "low": "stage4,stage5,stage6,stage7,features",
        "high": "head",
    }
    assert resolved["transfer"] == {**config["transfer"], "groups": groups}
    assert resolved["model"] == {**config["model"], "dropout": 0.2}
    assert {**resolved, "model": 0, "transfer": 0} == {**config, "model": 0, "transfer": 0}
    assert resolve(resolved) == resolved

    inception = {"name": "inception_v3", "auxiliary": 0.4, "dropout": 0.0, "drop_path": -1.0}
    resolved = resolve({**config, "model": {**config["model"], **inception}})
    assert resolved["transfer"]["groups"]["high"] == "aux,head"
    assert (resolved["model"]["dropout"], resolved["model"]["drop_path"]) == (0.0, 0.0)


def test_without_weights_only_the_default_groups_are_replaced(launch):
    from configs import default
    from experiments.finetune import resolve

    config = default.get_config().to_dict()
    config["model"]["weights"] = "none"
    resolved = resolve(config)
    assert resolved["transfer"]["groups"] == {"frozen": "", "low": "", "high": ".*"}
    assert resolved["transfer"]["bn"] == config["transfer"]["bn"]
    groups = {"frozen": "stem", "low": "stage[1-7],features", "high": "head"}
    config["transfer"]["groups"] = groups
    assert resolve(config)["transfer"]["groups"] == groups


def test_a_batch_larger_than_the_set_is_refused(refuse, tmp_path):
    message = refuse(command(tmp_path / "new", data__phantom__train=12))
    assert "data.batch_size=16 is larger than the training split (12 images)" in message


def test_selection_by_an_undefined_auc_is_refused(refuse, tmp_path):
    lines = ["path,split,label"]
    for number in range(20):
        name = f"{number}.png"
        image = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(image).save(tmp_path / name)
        split = "train" if number < 16 else "val" if number < 18 else "test"
        lines.append(f"{name},{split},{'cyst' if split == 'val' or number % 2 else 'polyp'}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    settings = {"data__name": "csv", "data__dir": tmp_path / "list.csv"}
    message = refuse(command(tmp_path / "new", train__select="auc", **settings))
    assert message.startswith("train.select=auc is undefined") and "no image of polyp" in message


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line(launch, refuse, trained, grey_set, tmp_path, monkeypatch):
    settings = {"experiment": "predict", "eval__run": trained, "data__dir": grey_set}
    again = command(tmp_path / "csv", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        message = refuse(again)
    assert message.startswith("cannot write ") and "No space left on device" in message
    assert launch.run_command(again) == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        assert str(tmp_path / "csv" / "predictions.csv") in refuse(again)
    # The same without a message of ours, as from a library.
    monkeypatch.setattr(runs, "open_folder", disk_full)
    assert refuse(again) == "OSError: [Errno 28] No space left on device"
