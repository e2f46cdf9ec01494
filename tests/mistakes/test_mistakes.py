"""The user's mistakes, through the command line: one line, exit code 2, nothing written."""

import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from mistake_commands import (
    ROOT,
    STUDY,
    TINY,
    TrainingBegan,
    class_folders,
    folder_keys,
    set_keys,
    snapshot,
    the_one_line,
)

from medtl_jax import runs
from medtl_jax.training import loop
from medtl_jax.weights.sources import find_weights

# ---- flags and values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.epoch=3"], ["config.train.epoch", "did you mean train.epochs"]),
        (["--config.train=3"], ["config.train", "train.epochs", "train.select"]),
        (["--config.train.epochs=abc"], ["--config.train.epochs=abc: not a whole number"]),
        (["--config.train.epochs", "1.5"], ["--config.train.epochs=1.5: not a whole number"]),
        (["--config.optim.low.lr=fast"], ["--config.optim.low.lr=fast: not a number"]),
        (["--config.optim.low.lr=nan"], ["optim.low.lr=nan must be a finite number"]),
        (["--config.optim.high.clip=inf"], ["optim.high.clip=inf must be a finite number"]),
        (["--config.seed"], ["Missing value", "--config.seed"]),
        (["--wrokdir=x"], ["Unknown command line flag 'wrokdir'"]),
        (["train.epochs=3"], ["unexpected argument 'train.epochs=3'", "--config.key=value"]),
        (["--", "x"], ["unexpected argument 'x'"]),
        (["--flagfile=gone"], ["gone", "No such file"]),
        (set_keys(experiment="finetun"), ["'finetun'", "finetune, extract, traditional, ladder"]),
        (set_keys(seed=-1), ["seed=-1 must be at least 0"]),
        (set_keys(data__batch_size=0), ["data.batch_size=0 must be at least 1 and at most 65536"]),
        (set_keys(eval__batch_size=-8), ["eval.batch_size=-8 must be at least 1"]),
        (set_keys(eval__batch_size=6), ["eval.batch_size=6 must be a positive multiple of the 4"]),
        (set_keys(eval__resamples=0), ["eval.resamples=0 must be at least 1"]),
        (set_keys(train__epochs=0), ["train.epochs=0 must be at least 1"]),
        (set_keys(train__select="dice"), ["train.select='dice'", "loss, ", "accuracy"]),
        (set_keys(train__devices=1000), ["train.devices=1000", "0 takes all"]),
        (set_keys(optim__low__weight_decay=-1), ["optim.low.weight_decay=-1.0 must be at least 0"]),
        (set_keys(optim__momentum=2), ["optim.momentum=2.0 must be at least 0 and at most 1"]),
        (set_keys(model__name="resnet19"), ["'resnet19'", "efficientnet_lite0"]),
        (
            set_keys(model__name="lenet5", model__weights="none", model__drop_path=0.5),
            ["model.drop_path: lenet5 has no residuals to drop; set it to 0"],
        ),
        (set_keys(model__image_size=15), ["model.image_size=15", "takes 16 to 1024 pixels"]),
        (set_keys(model__name="lenet5", model__image_size=15), ["lenet5 takes 16 to 1024"]),
        (set_keys(model__auxiliary=0.3), ["efficientnet_lite0 has no auxiliary heads"]),
        (
            set_keys(model__name="inception_v3", model__auxiliary=0.4, model__image_size=298),
            ["inception_v3 with its auxiliary heads takes 299 to 1024 pixels"],
        ),
        (set_keys(model__auxiliary=-1), ["model.auxiliary=-1.0 must be at least 0"]),
        (set_keys(model__dropout=1.0), ["model.dropout=1.0", "less than 1, or -1"]),
        (set_keys(model__drop_path=-0.5), ["model.drop_path=-0.5 must be at least 0"]),
        (set_keys(model__in_chans=-1), ["model.in_chans=-1 must be at least 0"]),
        (set_keys(model__compute="float8"), ["model.compute='float8'", "float32, bfloat16"]),
        (set_keys(data__name="xray"), ["'xray'", "phantom, npz, medmnist/<flag>, folder, csv"]),
        (set_keys(data__phantom__domain="c"), ["'c'", "a, b, mixed"]),
        (
            set_keys(transfer__groups__frozen="stem,stage[1-3],stage9"),
            ["transfer.groups.frozen", "'stage9' matches no stage", "stem, stage1"],
        ),
        (
            set_keys(transfer__groups__frozen="stem,stage[1-4]")
            + set_keys(transfer__groups__low="stage[4-7],features", transfer__groups__high="head"),
            ["in two groups: stage4 (frozen and low)"],
        ),
        (
            set_keys(transfer__groups__frozen="stem,stage[13]")
            + set_keys(transfer__groups__low="stage[4-7],features", transfer__groups__high="head"),
            ["in no group: stage2; add"],
        ),
        (set_keys(transfer__groups__frozen="stem,stage["), ["'stage['", "no regular expression"]),
        (
            set_keys(transfer__groups__frozen=".*"),
            ["every stage is frozen", "leave at least the head"],
        ),
        (set_keys(model__weights="imagnet"), ["imagnet", "no such file", "imagenet, none"]),
        (set_keys(optim__high__lr=0), ["optim.high.lr=0.0 must be positive"]),
        (set_keys(optim__name="adamm"), ["optim.name='adamm'", "adamw, sgd, rmsprop"]),
        (set_keys(task="detect"), ["task='detect' is not known", "classify, multilabel, ordinal"]),
        (set_keys(eval__target_sensitivity=0), ["eval.target_sensitivity=0.0 must be more than 0"]),
        (set_keys(eval__target_sensitivity=1.5), ["eval.target_sensitivity=1.5", "at most 1"]),
        (set_keys(eval__surface_tolerance=-1), ["eval.surface_tolerance=-1.0 must be at least 0"]),
        (set_keys(data__cache_gb=-1), ["data.cache_gb=-1.0 must be at least 0"]),
        (set_keys(train__sampling="rare"), ["train.sampling='rare'", "uniform, balanced"]),
        (set_keys(train__huber_delta=0), ["train.huber_delta=0.0 must be more than 0"]),
    ],
)
def test_flags_and_values(refusal, arguments, words):
    message = refusal(*arguments)
    assert all(word in message for word in words), message


def test_the_study_itself(refusal, tmp_path):
    assert "--config is missing" in refusal(study=())
    assert "Missing value for flag --config" in refusal(study=("--config",))
    assert "--config=gone.py: no such file" in refusal(study=("--config=gone.py",))
    header = "from configs import default\ndef get_config():\n c = default.get_config()\n "
    for body, words in [
        ("return c.nope", "line 4: AttributeError"),
        ("return {}", "must define get_config(), which returns a ConfigDict"),
        ("c.train.epoch = 1; return c", "has the unknown key train.epoch"),
        ("del c.seed; return c", "lacks the key seed"),
        ("c.train.lock(); c.train.epochs = 'x'; return c", "TypeError"),
        ("c.seed = 'x'; return c", "line 4: TypeError"),
        ("c.update({'seed': None}); return c", "seed=None must be of the type of 0"),
        ("return c)", "SyntaxError"),
    ]:
        (tmp_path / "study.py").write_text(f"{header}{body}\n")
        message = refusal(study=("--config=study.py",))
        assert message.startswith("--config=study.py") and words in message, message


@pytest.mark.parametrize(
    ("signature", "argument", "words"),
    [
        ("", ":x", "the study takes no argument: leave out the colon"),
        ("", ":", "the study takes no argument"),
        ("place", "", "the study needs an argument: write FILE.py:ARGUMENT"),
        ("place=''", ":", "nothing follows the colon"),
        ("place", ":mars", "study.py:mars: there is no mars"),
        ("place", ":pluto", "line 5: ValueError: too small"),
    ],
)
def test_the_argument_of_a_study(refusal, tmp_path, signature, argument, words):
    (tmp_path / "study.py").write_text(
        f"from medtl_jax.errors import UserError\ndef get_config({signature}):\n"
        " if place == 'mars': raise UserError(f'there is no {place}')\n"
        " assert place == 'pluto'\n raise ValueError('too small')\n"
    )
    message = refusal(study=(f"--config=study.py{argument}",))
    assert message.startswith("--config=study.py") and words in message, message


@pytest.mark.parametrize(("name", "argument"), [("study.py", "a:b.py:c"), ("x.py:y.py", None)])
def test_an_argument_reaches_the_study(launch, tmp_path, name, argument):
    try:
        (tmp_path / name).write_text(
            "from configs import default\ndef get_config(text='none'):\n"
            " config = default.get_config()\n config.data.dir = text\n return config\n"
        )
    except OSError:
        pytest.skip("this file system has no colons in names")
    given = name if argument is None else f"{name}:{argument}"
    assert launch._load_study(given).data.dir == (argument or "none")


# ---- data --------------------------------------------------------------------------------------


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes whose header declares side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_missing_data_folder(refusal, tmp_path):
    assert "no such folder: gone (data.dir)" in refusal(*folder_keys("gone"))
    assert "data.dir is empty" in refusal(*set_keys(data__name="folder"))
    assert "gone.csv" in refusal(*set_keys(data__name="csv", data__dir="gone.csv"))


def test_empty_class_folder(refusal, tmp_path):
    root = class_folders(tmp_path / "set")
    for split in ("train", "val", "test"):
        (root / split / "polyp").mkdir()
    assert "polyp is empty: add images or delete the class" in refusal(*folder_keys(root))


def test_train_split_with_one_class(refusal, tmp_path):
    root = class_folders(tmp_path / "set", ("cyst",))
    assert "only one class ('cyst')" in refusal(*folder_keys(root))


def test_images_that_are_none(refusal, tmp_path):
    root = class_folders(tmp_path / "set")
    jpeg = (root / "test" / "cyst" / "1.jpg").read_bytes()
    for name, content, words in [
        ("cut.jpg", jpeg[: len(jpeg) // 2], "truncated"),
        ("text.png", b"Not a picture at all.\n", "not a PNG, JPEG"),
        ("bomb.png", huge_png(60_000), "100,000,000 pixels"),
        ("empty.png", b"", "the file is empty"),
    ]:
        path = root / "train" / "cyst" / name
        path.write_bytes(content)
        message = refusal(*folder_keys(root))
        assert "1 of 13 images cannot be read" in message and str(path) in message
        assert words in message, message
        path.unlink()


def test_npz(refusal, tmp_path):
    images, labels = np.zeros((4, 32, 32), np.uint8), np.array([0, 1, 0, 1])
    splits = ("train", "val", "test")
    good = {f"{split}_images": images for split in splits}
    good |= {f"{split}_labels": labels for split in splits}
    for name, change, words in [
        ("set", {"val_images": np.array([None] * 4)}, "Python objects, which are never unpickled"),
        ("set", {"test_labels": labels + 1}, "train_labels has 2 of the 3 classes"),
        ("set", {"test_labels": labels - 1}, "test_labels has a negative label (-1)"),
        ("breastmnist", {"val_labels": labels + 1}, "label 2 is out of range for the 2 classes"),
        ("set", {f"{split}_labels": 0 * labels for split in splits}, "all labels are 0"),
    ]:
        path = tmp_path / f"{name}.npz"
        np.savez(path, **(good | change))
        message = refusal(*set_keys(data__name="npz", data__dir=path))
        assert message.startswith(str(path)) and words in message, message


# ---- weights -----------------------------------------------------------------------------------


class Attack:
    """Unpickled the usual way, this makes a file; here nothing may be called."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def hostile_weights(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A file laid out as torch's legacy format, whose state dict calls os.system; its marker."""
    marker, path = folder / "it-ran", folder / "hostile.pth"
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Attack(marker), [])
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    return path, marker


def test_truncated_weights(refusal, tmp_path):
    path = tmp_path / "short.pth"
    path.write_bytes(find_weights("efficientnet_lite0", "imagenet").read_bytes()[:-1])
    message = refusal(*set_keys(model__weights=path))
    assert message.startswith(f"weights file {path}: truncated inside storage"), message
    assert message.endswith("copy or download it again")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__keep_head": True}, "params/head/bias: file [1000], model [4]"),
        ({"model__dont_load": "params/stage8/.*"}, "'params/stage8/.*' matches no name"),
        ({"model__dont_load": "params/(stem"}, "'params/(stem' is no regular expression"),
        ({"model__dont_load": ".*"}, "dont_load leaves nothing to load"),
        ({"model__name": "lenet5"}, "no ImageNet weights are known for the model 'lenet5'"),
        (
            {"model__dont_load": "params/stage1/.*"},
            "stage1 keeps its own first values (model.dont_load) but is frozen: put it into low",
        ),
        (
            {"transfer__groups__frozen": "head", "transfer__groups__low": "st.*,features"},
            "head keeps its own first values (model.keep_head) but is frozen: put it into low",
        ),
        (
            {"model__weights": "none", "model__dont_load": "params/stem/.*"},
            "model.dont_load='params/stem/.*' has no effect without model.weights; leave it out",
        ),
        (
            {"model__weights": "none", "model__keep_head": True},
            "model.keep_head=True has no effect without model.weights; leave it out",
        ),
    ],
)
def test_weights_that_do_not_fit(refusal, settings, words):
    message = refusal(*set_keys(**settings))
    assert words in message, message


def test_weights_of_a_smaller_network(refusal):
    path = find_weights("efficientnet_lite0", "imagenet")
    message = refusal(*set_keys(model__name="efficientnet_lite1", model__weights=path))
    assert message.startswith(f"weights file {path}: the weights do not fit the model: ")
    assert "missing from the file (batch_stats/stage6/block2/" in message
    assert "stage2/block3/project/norm/mean: file [40], model [24]" in message


def test_hostile_weights_do_nothing(refusal, tmp_path):
    path, marker = hostile_weights(tmp_path)
    message = refusal(*set_keys(model__weights=path))
    assert message.startswith(f"weights file {path}") and "system" in message
    assert not marker.exists()
    # The file is what it claims: the ordinary way of reading it does run the command.
    with path.open("rb") as stream:
        for _ in range(4):
            pickle.load(stream)
    assert marker.exists()


# ---- the run folder ----------------------------------------------------------------------------


def test_folders_that_are_taken(launch, refusal, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    with pytest.raises(TrainingBegan):
        launch.run_command(["launch.py", STUDY, *TINY, workdir])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    message = refusal(workdir, "--config.seed=1")
    assert "holds a run of another config: seed (0 there, 1 now)" in message
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    message = refusal(f"--workdir={tmp_path / 'notes'}")
    assert "is not empty and no run folder; name a new folder" in message
    assert "is a file" in refusal(f"--workdir={tmp_path / 'notes' / 'a.txt'}")
    assert "cannot be made" in refusal(f"--workdir={tmp_path / 'notes' / 'a.txt' / 'run'}")


def test_ctrl_c_is_130(launch, monkeypatch, capfd):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Runner", interrupt)
    assert launch.run_command(["launch.py", STUDY, *TINY]) == 130
    message = "interrupted; the same command continues or repeats the run\n"
    assert capfd.readouterr().err == message


def test_ctrl_c_while_the_folder_is_made_leaves_none(launch, monkeypatch, tmp_path):
    def interrupt(path, value):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "write_json", interrupt)
    assert launch.run_command(["launch.py", STUDY, *TINY, "--workdir=run"]) == 130
    assert snapshot(tmp_path) == {}


def test_help_is_no_mistake(launch, capfd):
    assert launch.run_command(["launch.py", "--help"]) == 0
    output, error = capfd.readouterr()
    assert "--config=configs/finetune.py" in output and "--workdir" in output and not error


# ---- the whole path ----------------------------------------------------------------------------


def in_a_process(folder: pathlib.Path, cache: str | None, *arguments: str) -> str:
    """The message of `python launch.py ...`, run in `folder`, which stays as it is."""
    before = snapshot(folder)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert snapshot(folder) == before
    return the_one_line(done.stderr)


def test_unknown_key_in_a_process(tmp_path, compilation_cache):
    message = in_a_process(tmp_path, compilation_cache, STUDY, "--config.optim.lr=1")
    assert message.startswith("no key config.optim.lr: did you mean optim.")


def test_image_that_is_none_in_a_process(tmp_path, compilation_cache):
    root = class_folders(tmp_path / "set")
    (root / "val" / "normal" / "1.jpg").write_bytes(b"Not a picture at all.")
    message = in_a_process(tmp_path, compilation_cache, STUDY, *TINY, *folder_keys(root))
    assert "1 of 12 images cannot be read" in message and "val/normal/1.jpg" in message


def test_hostile_weights_in_a_process(tmp_path, compilation_cache):
    path, marker = hostile_weights(tmp_path)
    weights = f"--config.model.weights={path}"
    message = in_a_process(tmp_path, compilation_cache, STUDY, *TINY, weights)
    assert "system" in message and not marker.exists()
