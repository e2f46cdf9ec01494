"""The loop: which epoch is best, when it stops, and that a resumed run equals a whole one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from epoch_records import Notes, without_costs

from medtl_jax.data.catalog import Dataset, DataSpec, Split
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task
from medtl_jax.training import loop, runner
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import (
    Keeping,
    LoopSettings,
    Training,
    TrainingPhase,
    check_splits,
    fit,
)
from medtl_jax.training.runner import Feed
from medtl_jax.training.selection import best_epoch, best_so_far, task_validator
from medtl_jax.training.step import evaluation_variables

TASK = Task("classify", ("low", "middle", "high"))
LOSS = task_validator("loss", TASK)


def make_settings(**fields):
    settings = {"epochs": 4, "min_steps": 0, "batch_size": 16, "patience": 0, "select": "loss"}
    return LoopSettings(**{**settings, "seed": 3, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
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


@dataclasses.dataclass(frozen=True)
class Study:
    """A run in a folder, to be begun and continued as two processes would."""

    training: object
    splits: dict
    folder: object
    mesh: object
    settings: LoopSettings

    def fit(self, **settings):
        """`(history, notes)` of a call with a state, a runner and checkpoints of its own."""
        chosen, console = dataclasses.replace(self.settings, **settings), Notes()
        parts, train = self.training.parts, self.splits["train"]
        predict = make_predict(parts.model, parts.spec, self.mesh, 8)
        training = Training(
            phases=[TrainingPhase(0, parts)],
            feed=Feed({"train": {"image": train.images, "target": train.target}}),
            val=self.splits["val"],
            task=TASK,
            settings=chosen,
            schedules={"high": lambda step: 0.5 / (1 + step)},
            mesh=self.mesh,
        )
        with Checkpoints(self.folder / "checkpoints") as checkpoints:
            keeping = Keeping(checkpoints, self.folder, console)
            history = fit(training, self.training.state(), predict, keeping)
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
        image, label = pictures["image"], pictures["target"]
        splits = {
            "train": Split(image[:40], label[:40], ids[:40]),
            "val": Split(image[35:], label[35:], ids[35:]),
        }
        fields = {"training": make_training(ema=0.5), "mesh": data_mesh(4), **fields}
        return Study(splits=splits, folder=tmp_path / name, settings=make_settings(), **fields)

    return make


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
    assert without_costs(resumed) == without_costs(history)
    assert without_costs(parts.lines()) == without_costs(history)
    best = best_epoch(history, LOSS)
    np.testing.assert_array_equal(parts.predictions(best), whole.predictions(best))


def test_records_hold_what_happened(make_study):
    study = make_study("run")
    history, _ = study.fit(epochs=2)
    assert study.lines() == history
    for record in history:
        # 40 images in batches of 16 are 2.5, rounded to the even 2 steps an epoch.
        assert record["step"] == 2 * record["epoch"]
        assert record["lr_high"] == pytest.approx(0.5 / record["step"])
        assert {"train_loss", "val_accuracy", "gradient_norm_low", "val_auc"} <= record.keys()
        assert record["seconds"] > 0
    logits = study.predictions(best_epoch(history, LOSS))
    labels = study.splits["val"].target
    chosen = history[best_epoch(history, LOSS) - 1]
    assert chosen["val_accuracy"] == (logits.argmax(-1) == labels).mean()


def test_every_epoch_draws_its_own_steps_also_after_a_restart(make_study, monkeypatch):
    calls, draw = [], runner.training_indices
    monkeypatch.setattr(runner, "training_indices", lambda *a: calls.append(a) or draw(*a))
    study = make_study("run")
    study.fit(epochs=2)
    study.fit(epochs=3)
    # (seed, first step, steps, examples, batch size, groups)
    wanted = [(3, 0, 2, 40, 16, None), (3, 2, 2, 40, 16, None), (3, 4, 2, 40, 16, None)]
    assert calls == wanted


def test_a_finished_run_is_not_trained_again(make_study):
    study = make_study("run")
    history, _ = study.fit(epochs=1)
    again, _ = study.fit(epochs=1)
    assert again == history


def scripted(values, name="loss"):
    """Stands for `validate`: the given values, one an epoch."""
    found, others = iter(values), {"val_loss": 1.0, "val_accuracy": 0.5, "val_auc": None}
    return lambda *arguments: {**others, f"val_{name}": next(found)}


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
    assert len(history) == epochs and best_epoch(history, LOSS) == best
    stopped = f"stopped early: no better val loss in {patience} epochs"
    assert (stopped in notes) == (epochs < 5)
    # A stopped run that is started again stops again.
    monkeypatch.setattr(loop, "validate", scripted([-1.0]))
    assert study.fit(epochs=5, patience=patience)[0] == history


def test_a_value_undefined_in_the_first_epochs_is_no_end(make_study, monkeypatch):
    values = [None, None, 0.25, 0.5]
    monkeypatch.setattr(loop, "validate", scripted(values, "mcc"))
    whole, parts = make_study("whole"), make_study("parts")
    # Two epochs without a better one, but nothing to be better than.
    wanted = {"select": "mcc", "patience": 2}
    history, notes = whole.fit(**wanted)
    assert [record["val_mcc"] for record in history] == values
    assert [line.endswith("best") for line in notes] == [False, False, True, True]
    monkeypatch.setattr(loop, "validate", scripted(values, "mcc"))
    begun, _ = parts.fit(**wanted, epochs=2)
    assert best_so_far(begun, task_validator("mcc", TASK)) is None
    resumed, notes = parts.fit(**wanted)
    assert notes[0] == "continuing after epoch 2"
    assert without_costs(resumed) == without_costs(history)
    np.testing.assert_array_equal(parts.predictions(4), whole.predictions(4))
    with pytest.raises(UserError, match="no checkpoint of epoch 1"):
        parts.predictions(1)


def test_splits_without_what_the_selection_needs_are_refused(make_study):
    study = make_study("run")
    two = study.splits["val"]
    two = dataclasses.replace(two, target=np.minimum(two.target, 1))
    dataset = Dataset(DataSpec("set", "classify", TASK.classes), {**study.splits, "val": two})
    check_splits(dataset, TASK, make_settings(select="mcc"))
    with pytest.raises(UserError, match="auc is undefined: the validation split has no image of h"):
        check_splits(dataset, TASK, make_settings(select="auc"))
    with pytest.raises(UserError, match="select='dice' is no value of the task classify"):
        check_splits(dataset, TASK, make_settings(select="dice"))


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
