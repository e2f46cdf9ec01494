"""The command that compares runs: what it prints and writes, and what it refuses."""

import base64
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from experiments.compare import main
from medtl_jax.commands import run_tool
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.runs import write_json

CLASSES = ("background", "cyst", "<b>mass</b>")
FAST = ("--resamples", "100")


def softmax(logits: np.ndarray) -> np.ndarray:
    power = np.exp(logits)
    return power / power.sum(axis=-1, keepdims=True)


def predictions(task: str, noise: float, n: int = 40) -> dict[str, np.ndarray]:
    """The same targets for every `noise`."""
    rng = np.random.default_rng(0)
    if task == "segment":
        target = np.zeros((n, 8, 8), np.uint8)
        target[:, 1:4, 1:4], target[:, 5:, 4:] = 1, 2
        score = softmax(2 * np.eye(3)[target] + noise * rng.normal(size=(n, 8, 8, 3)))
    elif task == "regress":
        target = rng.normal(40, 10, (n, 3)).astype(np.float32)
        score = target + 5 * noise * rng.normal(size=(n, 3))
    elif task == "multilabel":
        target = rng.integers(-1, 2, (n, 3)).astype(np.int8)
        score = 1 / (1 + np.exp(-target - noise * rng.normal(size=(n, 3))))
    else:
        target = rng.integers(0, 3, n).astype(np.int32)
        score = softmax(2 * np.eye(3)[target] + noise * rng.normal(size=(n, 3)))
    dtype = np.float16 if task == "segment" else np.float32
    ids = np.array([f"image{i}" for i in range(n)])
    return {"id": ids, "target": target, "score": score.astype(dtype)}


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(
        folder / "predictions.npz", **{f"test_{name}": array for name, array in arrays.items()}
    )


def make_run(folder: pathlib.Path, noise: float, task: str = "classify", **model) -> pathlib.Path:
    """A run folder as a finished run leaves it, as far as it is compared."""
    folder.mkdir(parents=True)
    arrays = predictions(task, noise)
    save(folder, arrays)
    config = {"task": task, "model": model, "eval": {"surface_tolerance": 1.0}}
    write_json(folder / "config.json", config)
    data = {"name": "ward", "task": task, "classes": CLASSES, "sha256": "0" * 64}
    write_json(folder / "environment.json", {"data": data, "weights": None, "commit": "abc"})
    scored = score_with_intervals(task, arrays["target"], arrays["score"], CLASSES, resamples=50)
    write_json(folder / "metrics.json", {"test": scored})
    return folder


def pair(folder: pathlib.Path, task: str = "classify") -> list[str]:
    return [
        str(make_run(folder / "good", 0.3, task, weights="imagenet")),
        str(make_run(folder / "bad", 3.0, task, weights="none")),
    ]


@pytest.mark.parametrize(
    ("task", "primary", "figures"),
    [
        ("classify", "accuracy", ["classification", "confusion_1", "confusion_2", "differences"]),
        ("multilabel", "auc", ["classification", "differences"]),
        (
            "segment",
            "dice",
            [
                "classification",
                "confusion_1",
                "confusion_2",
                "differences",
                "segmentation_regression",
            ],
        ),
        ("regress", "mae/cyst", ["differences", "segmentation_regression"]),
    ],
)
def test_a_comparison_of_every_task(tmp_path, capsys, task, primary, figures):
    out, pictures = tmp_path / "out" / "page.html", tmp_path / "figures"
    names = pair(tmp_path, task)
    arguments = [*names, *FAST, "--out", str(out), "--figures", str(pictures)]
    assert run_tool(main, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "second: bad, first: good"
    (row,) = (line for line in lines if line.startswith(f"{primary} (primary) "))
    assert row.endswith("worse")
    others = [line for line in lines[2:-2] if "(primary)" not in line]
    assert others and not any("worse" in line or "better" in line for line in others)
    assert lines[-1] == f"comparison: {out}"
    assert sorted(path.stem for path in pictures.iterdir()) == figures
    page = out.read_text(encoding="utf-8")
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(found) == len(figures) and len(page) < 2_000_000
    for content in found:
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert min(image.size) > 200
    assert "▼ worse" in page and "default-src &#x27;none&#x27;" not in page
    assert "default-src 'none'" in page and "<script" not in page
    assert not re.findall(r'(?:href|src)="(?!data:)', page), "nothing is fetched"
    assert "<b>mass" not in page, "names from outside are text"
    assert "&#x27;imagenet&#x27;" in page and "&#x27;none&#x27;" in page, "what differs"
    assert "python -m experiments.compare" in page


def test_equal_commands_give_equal_pages(tmp_path, capsys):
    names, out = pair(tmp_path), tmp_path / "page.html"
    pages = []
    for _ in range(2):
        assert run_tool(main, [*names, *FAST, "--out", str(out)]) == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    capsys.readouterr()


def test_three_runs_and_patients(tmp_path, capsys):
    names = [*pair(tmp_path), str(make_run(tmp_path / "third" / "good", 0.3))]
    for name in names:
        arrays = predictions("classify", {"bad": 3.0}.get(pathlib.Path(name).name, 0.3))
        save(pathlib.Path(name), arrays | {"patient": np.repeat(["p", "q", "r", "s"], 10)})
    out = tmp_path / "page.html"
    assert run_tool(main, [*names, *FAST, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"second: {tmp_path / 'third' / 'good'}, first: {tmp_path / 'good'}" in text
    assert text.count("cannot tell at n = 4 patients") == 4
    assert text.count("(primary)") == 4 and "no resample differs" in text
    page = out.read_text(encoding="utf-8")
    assert "40 images of 4 patients" in page and "draws of patients" in page


def edit(path: pathlib.Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def other_ids(folder):
    arrays = predictions("classify", 1.0)
    save(folder, arrays | {"id": np.char.add("new", arrays["id"])})


def other_task(folder):
    edit(folder / "environment.json", lambda value: value["data"].update(task="ordinal"))


def without_classes(folder):
    edit(folder / "environment.json", lambda value: value["data"].update(classes=[1, 2]))


def bad_entry(folder):
    edit(folder / "metrics.json", lambda value: value["test"]["auc"].update(ci95=["a", "b"]))


def without_value(folder):
    edit(folder / "metrics.json", lambda value: value["test"]["auc"].pop("value"))


def pickled(folder):
    arrays = predictions("classify", 1.0)
    save(folder, arrays | {"target": arrays["target"].astype(object)})


def short(folder):
    arrays = predictions("classify", 1.0)
    save(folder, arrays | {"score": arrays["score"][1:]})


def words(folder):
    arrays = predictions("classify", 1.0)
    save(folder, arrays | {"score": arrays["score"].astype(str)})


def not_probabilities(folder):
    arrays = predictions("classify", 1.0)
    save(folder, arrays | {"score": arrays["score"] - 1})


def no_score(folder):
    arrays = predictions("classify", 1.0)
    save(folder, {"id": arrays["id"], "target": arrays["target"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_ids, "good and bad did not predict the same images: 40 of 40 are in the first only"),
        (other_task, "good and bad are of different tasks (classify, ordinal)"),
        (without_classes, "names no task and classes"),
        (bad_entry, "metrics.json is damaged"),
        (without_value, "metrics.json is damaged"),
        (lambda folder: (folder / "metrics.json").unlink(), "bad is not finished: it has no metr"),
        (lambda folder: (folder / "config.json").unlink(), "bad is no run folder"),
        (lambda folder: (folder / "predictions.npz").unlink(), "bad has no predictions.npz"),
        (lambda folder: (folder / "predictions.npz").write_bytes(b"PK"), "cannot be read: trunc"),
        (no_score, "cannot be read: it has no test_score"),
        (pickled, "never unpickled"),
        (short, "test_score has another length than test_id"),
        (words, "is damaged: test_score is <U"),
        (not_probabilities, "the predictions of bad are damaged: want probabilities"),
    ],
)
def test_runs_that_are_refused(tmp_path, capsys, change, message):
    names, out = pair(tmp_path), tmp_path / "page.html"
    change(tmp_path / "bad")
    assert run_tool(main, [*names, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not captured.out and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good"], "1 runs: name 2 to 21 run folders"),
        (["good", "good"], "good is named twice"),
        (["good", "nowhere"], "nowhere is no run folder: there is no such folder"),
        (["good", "bad", "--split", "val"], "good has no metrics of split val: --split=test"),
        (["good", "bad", "--resamples", "5"], "--resamples=5"),
        (["good", "bad", "--level", "1"], "unrecognized arguments"),
        (["good", "nowhere", "--out", "good"], "--out=good is a folder: name a file"),
        (["good", "nowhere", "--out", "a_file/x.html"], "a_file is a file, no folder"),
        (["good", "nowhere", "--figures", "a_file"], "a_file is a file, no folder"),
        (["good", "nowhere", "--figures", "a_file/x"], "--figures: "),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch, arguments, message):
    pair(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    assert run_tool(main, arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize("tolerance", [None, -1, "wide", True])
def test_the_tolerance_of_surfaces_is_the_runs(tmp_path, capsys, tolerance):
    names = pair(tmp_path, "segment")
    edit(tmp_path / "good" / "config.json", lambda c: c["eval"].update(surface_tolerance=tolerance))
    assert run_tool(main, names) == 2
    assert "no eval.surface_tolerance of 0 or more" in capsys.readouterr().err


def test_runs_of_unlike_tolerances_are_refused(tmp_path, capsys):
    names = pair(tmp_path, "segment")
    edit(tmp_path / "bad" / "config.json", lambda c: c["eval"].update(surface_tolerance=3.0))
    assert run_tool(main, names) == 2
    error = capsys.readouterr().err
    assert "have eval.surface_tolerance=1 and 3: evaluate them with the same one" in error
