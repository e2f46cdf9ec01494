"""The loop: which epoch is best, when it stops, and that a resumed run equals a whole one."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from medtl_jax.console import Console
from medtl_jax.data.catalog import Split
from medtl_jax.errors import UserError
from medtl_jax.training import loop
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import LoopSettings, best_epoch, fit
from medtl_jax.training.step import evaluation_variables

CLASSES = ("low", "middle", "high")
TIMINGS = ("seconds", "images_per_second")


def make_settings(**fields):
    settings = {"epochs": 4, "min_steps": 0, "batch_size": 16, "patience": 0, "select": "loss"}
    return LoopSettings(**{**settings, "seed": 3, **fields})


def log(name, values):
    return [{"epoch": e, f"val_{name}": value} for e, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("select", "values", "expected"),
    [
        ("loss", [3.0, 1.0, 2.0], 2),
        ("loss", [1.0, 0.5, 0.5], 2),  # the earliest of equals
        ("accuracy", [0.5, 0.9, 0.9, 0.1], 2),
        ("auc", [None, 0.4, None, 0.6, 0.5], 4),
        ("auc", [None, 0.5, 0.5], 2),
        ("loss", [0.0, -0.0], 1),
    ],
)
def test_best_epoch_by_hand(select, values, expected):
    assert best_epoch(log(select, values), select) == expected


def test_a_value_that_is_never_defined_is_one_line():
    message = r"train.select=auc is undefined on the validation split; choose train.select=loss"
    with pytest.raises(UserError, match=message):
        best_epoch(log("auc", [None, None]), "auc")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "f1"}, r"train.select='f1' is not known; choose from loss, accuracy, auc"),
        ({"epochs": 0}, r"train.epochs must be at least 1"),
        ({"patience": -1}, r"train.patience and train.min_steps at least 0"),
        ({"min_steps": -1}, r"train.patience and train.min_steps at least 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make_settings(**fields)


@pytest.mark.parametrize(
    ("epochs", "min_steps", "steps", "expected"),
    [(4, 0, 3, 4), (4, 12, 3, 4), (4, 13, 3, 5), (1, 250, 29, 9), (5, 250, 100, 5)],
)
def test_small_sets_get_more_epochs(epochs, min_steps, steps, expected):
    assert make_settings(epochs=epochs, min_steps=min_steps).for_set(steps).epochs == expected


class Notes(Console):
    """A console that remembers."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@dataclasses.dataclass(frozen=True)
class Study:
    """A run in a folder, to be begun and continued as two processes would."""

    training: object
    splits: dict
    folder: object
    mesh: object
    settings: LoopSettings
    classes: tuple = CLASSES

    def fit(self, **settings):
        """`(history, notes)` of a call with a state, a runner and checkpoints of its own."""
        chosen, console = dataclasses.replace(self.settings, **settings), Notes()
        parts = self.training.parts
        predict = make_predict(parts.model, parts.spec, self.mesh, 8)
        with Checkpoints(self.folder / "checkpoints") as checkpoints:
            history = fit(
                self.training.state(),
                parts,
                self.splits,
                self.classes,
                chosen,
                {"high": lambda step: 0.5 / (1 + step)},
                predict,
                self.mesh,
                checkpoints,
                self.folder,
                console,
            )
        return history, console.lines

    def predictions(self, epoch):
        parts = self.training.parts
        template = jax.eval_shape(lambda: evaluation_variables(self.training.state()))
        with Checkpoints(self.folder / "checkpoints", read_only=True) as checkpoints:
            best = checkpoints.restore_best(epoch, template)
        return make_predict(parts.model, parts.spec, self.mesh, 8)(best, self.splits["val"].images)

    def lines(self):
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]


@pytest.fixture
def make_study(tmp_path, make_training, pictures):
    def make(name, **fields):
        (tmp_path / name).mkdir()
        ids = np.array([f"{i}" for i in range(48)])
        image, label = pictures["image"], pictures["label"]
        splits = {
            "train": Split(image[:40], label[:40], ids[:40]),
            "val": Split(image[35:], label[35:], ids[35:]),
        }
        fields = {"training": make_training(ema=0.5), "mesh": data_mesh(4), **fields}
        return Study(splits=splits, folder=tmp_path / name, settings=make_settings(), **fields)

    return make


def without_timings(history):
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in history]


def test_a_resumed_run_equals_a_whole_one(make_study):
    whole, parts = make_study("whole"), make_study("parts")
    history, notes = whole.fit()
    assert len(history) == 4 and not any("continuing" in note for note in notes)
    parts.fit(epochs=2)
    jsonl = parts.folder / "metrics.jsonl"
    # A run killed while its third checkpoint was being written leaves a third line.
    jsonl.write_text(jsonl.read_text() + '{"epoch": 3, "val_loss": -1.0}\n{"epo')
    resumed, notes = parts.fit()
    assert notes[0] == "continuing after epoch 2"
    assert without_timings(resumed) == without_timings(history)
    assert without_timings(parts.lines()) == without_timings(history)
    best = best_epoch(history, "loss")
    np.testing.assert_array_equal(parts.predictions(best), whole.predictions(best))


def test_records_hold_what_happened(make_study):
    study = make_study("run")
    history, _ = study.fit(epochs=2)
    assert study.lines() == history
    for record in history:
        # 40 images in batches of 16 are 2.5, rounded to the even 2 steps an epoch.
        assert record["step"] == 2 * record["epoch"]
        assert record["lr_high"] == pytest.approx(0.5 / record["step"])
        assert {"train_loss", "train_accuracy", "gradient_norm_low", "val_auc"} <= record.keys()
        assert record["seconds"] > 0
    logits = study.predictions(best_epoch(history, "loss"))
    labels = study.splits["val"].labels
    chosen = history[best_epoch(history, "loss") - 1]
    assert chosen["val_accuracy"] == (logits.argmax(-1) == labels).mean()


def test_every_epoch_draws_its_own_steps_also_after_a_restart(make_study, monkeypatch):
    calls, draw = [], loop.training_indices
    monkeypatch.setattr(loop, "training_indices", lambda *a: calls.append(a) or draw(*a))
    study = make_study("run")
    study.fit(epochs=2)
    study.fit(epochs=3)
    # (seed, first step, steps, examples, batch size)
    assert calls == [(3, 0, 2, 40, 16), (3, 2, 2, 40, 16), (3, 4, 2, 40, 16)]


def test_a_finished_run_is_not_trained_again(make_study):
    study = make_study("run")
    history, _ = study.fit(epochs=1)
    again, _ = study.fit(epochs=1)
    assert again == history


def scripted(values):
    """Stands for `validate`: the given losses, one an epoch."""
    losses = iter(values)
    return lambda *arguments: {"val_loss": next(losses), "val_accuracy": 0.5, "val_auc": None}


@pytest.mark.parametrize(
    ("patience", "losses", "epochs", "best"),
    [
        (2, [3.0, 1.0, 2.0, 2.0, 0.0], 4, 2),
        (1, [3.0, 2.0, 1.0, 1.0, 0.0], 4, 3),  # an equal value is no better one
        (0, [1.0, 2.0, 3.0, 4.0, 5.0], 5, 1),
    ],
)
def test_early_stopping_by_hand(make_study, monkeypatch, patience, losses, epochs, best):
    monkeypatch.setattr(loop, "validate", scripted(losses))
    study = make_study("run")
    history, notes = study.fit(epochs=5, patience=patience)
    assert len(history) == epochs and best_epoch(history, "loss") == best
    stopped = f"stopped early: no better val loss in {patience} epochs"
    assert (stopped in notes) == (epochs < 5)
    # A stopped run that is started again stops again.
    monkeypatch.setattr(loop, "validate", scripted([-1.0]))
    assert study.fit(epochs=5, patience=patience)[0] == history


def test_divergence_is_one_line(make_study, make_training):
    study = make_study("run", training=make_training(rates={"low": 1e30, "high": 1e38}))
    with pytest.raises(UserError, match=r"training diverged: .* not finite; lower optim"):
        study.fit(epochs=4)


def test_write_history_replaces_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n" * 100)
    loop.write_history(path, [{"epoch": 1, "val_auc": None}])
    assert path.read_text() == '{"epoch": 1, "val_auc": null}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
