"""Members of one program against trainings that run alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from epoch_records import without_costs

from medtl_jax.console import Console
from medtl_jax.data.catalog import Split
from medtl_jax.objectives.task import Task
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import Keeping, LoopSettings, Training, TrainingPhase, fit
from medtl_jax.training.members import fit_members
from medtl_jax.training.runner import Feed
from medtl_jax.training.step import evaluation_variables

TASK = Task("classify", ("low", "middle", "high"))
FROZEN = {"frozen": "stem,stage.,features", "low": "", "high": "head"}
EPOCHS = 4


@dataclasses.dataclass(frozen=True)
class Member:
    """One training of a head on features of its own, in a folder."""

    base: object
    folder: object
    training: Training

    def until(self, epochs, patience=0):
        settings = dataclasses.replace(self.training.settings, epochs=epochs, patience=patience)
        return dataclasses.replace(
            self, training=dataclasses.replace(self.training, **{"settings": settings})
        )

    def best(self, epoch):
        template = jax.eval_shape(lambda: evaluation_variables(self.base.state()))
        with Checkpoints(self.folder / "checkpoints", read_only=True) as checkpoints:
            return checkpoints.restore_best(epoch, template)


@pytest.fixture
def member(tmp_path, make_training):
    """`make(name, seed, wrong=False)`; the classes of a `wrong` one are others for validation."""
    base = make_training(FROZEN, rates={"high": 0.03}, ema=0.5, dropout=0.2)
    parts = dataclasses.replace(base.parts, start="head")

    def make(name, seed, wrong=False):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(seed)
        target = (np.arange(48) % 3).astype(np.int32)
        features = rng.standard_normal((48, 16), np.float32)
        features[:, 0] += 3 * target
        val = Split(features[32:], (target[32:] + wrong) % 3, np.arange(16).astype(str))
        training = Training(
            phases=[TrainingPhase(0, parts)],
            feed=Feed({"train": {"image": features[:32], "target": target[:32]}}),
            val=val,
            task=TASK,
            settings=LoopSettings(EPOCHS, 0, 8, 0, "loss", seed),
            schedules={"high": lambda step: 0.03},
            mesh=data_mesh(1),
        )
        return Member(dataclasses.replace(base, parts=parts), tmp_path / name, training)

    return make


def trained(members, alone=False):
    """The histories of the members, each by itself or all in one program."""
    first = members[0].training.phases[0].parts
    predict = make_predict(first.model, first.spec, data_mesh(1), 16, "head")
    opened = [Checkpoints(member.folder / "checkpoints") for member in members]
    keepings = [
        Keeping(checkpoints, member.folder, Console())
        for checkpoints, member in zip(opened, members, strict=True)
    ]
    trainings = [member.training for member in members]
    states = [member.base.state() for member in members]
    try:
        if not alone:
            return fit_members(trainings, states, predict, keepings)
        given = zip(trainings, states, keepings, strict=True)
        return [fit(training, state, predict, keeping) for training, state, keeping in given]
    finally:
        for checkpoints in opened:
            checkpoints.close()


def assert_same(found, wanted):
    """Histories that agree to float tolerance, but for what they took."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(without_costs(found), without_costs(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def assert_same_best(member, other, epoch):
    for ours, theirs in zip(
        jax.tree.leaves(member.best(epoch)), jax.tree.leaves(other.best(epoch)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_members_end_as_each_does_alone_also_after_one_of_them_was_stopped(member):
    alone = [member("alone0", 0), member("alone1", 1)]
    wanted = trained(alone, alone=True)
    assert wanted[0][-1]["val_loss"] != pytest.approx(wanted[1][-1]["val_loss"], rel=1e-2)
    # The second was begun by itself, and goes on as a member from its second epoch on.
    together = [member("together0", 0), member("together1", 1)]
    trained([together[1].until(2)], alone=True)
    found = trained(together)
    for number in range(2):
        assert_same(found[number], wanted[number])
        losses = [record["val_loss"] for record in wanted[number]]
        epoch = losses.index(min(losses)) + 1
        assert_same_best(together[number], alone[number], epoch)
        lines = (together[number].folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == found[number]
    # All are done: nothing is left to be trained.
    assert trained(together) == found


def test_a_member_that_stops_early_leaves_the_others_to_go_on(member):
    alone = [member("alone0", 0), member("alone1", 1, wrong=True)]
    alone = [one.until(EPOCHS, patience=1) for one in alone]
    wanted = trained(alone, alone=True)
    assert [len(history) for history in wanted] == [EPOCHS, 2]
    together = [member("together0", 0), member("together1", 1, wrong=True)]
    found = trained([one.until(EPOCHS, patience=1) for one in together])
    for number in range(2):
        assert_same(found[number], wanted[number])
    assert_same_best(together[1], alone[1], 1)
