"""Members of one program against trainings that run alone."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from epoch_records import without_costs

from medtl_jax.console import Console
from medtl_jax.data.catalog import Split
from medtl_jax.ensemble import program
from medtl_jax.ensemble.layout import make_layout
from medtl_jax.ensemble.members import fit_members
from medtl_jax.ensemble.program import PROGRAMS, Program
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task
from medtl_jax.process import Preempted, termination
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import Keeping, LoopSettings, Training, TrainingPhase, fit
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


def trained(members, alone=False, program="auto"):
    """The histories of the members, each by itself or all in one program."""
    first = members[0].training.phases[0].parts
    predict = make_predict(first.model, first.spec, data_mesh(1), 16, first.start)
    opened = [Checkpoints(member.folder / "checkpoints") for member in members]
    keepings = [
        Keeping(checkpoints, member.folder, Console())
        for checkpoints, member in zip(opened, members, strict=True)
    ]
    trainings = [member.training for member in members]
    states = [member.base.state() for member in members]
    try:
        if not alone:
            return fit_members(trainings, states, predict, keepings, program)
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


def test_members_that_sigterm_stops_in_an_epoch_have_saved_the_one_before(network, monkeypatch):
    wanted = trained([network("whole0", 0), network("whole1", 1)])
    stopped, steps = [network("stopped0", 0), network("stopped1", 1)], []

    @contextlib.contextmanager
    def progress(console, title):
        def advance(done, total):
            steps.append(done)
            if title.startswith("epoch 2/") and done == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        yield advance

    with monkeypatch.context() as patched, termination.listening():
        patched.setattr(Console, "progress", progress)
        with pytest.raises(Preempted):
            trained(stopped)
    assert steps[-1] == 1
    for member in stopped:
        with Checkpoints(member.folder / "checkpoints", read_only=True) as checkpoints:
            assert checkpoints.last_epoch() == 1
    with termination.listening():
        found = trained(stopped)
    for ours, theirs in zip(found, wanted, strict=True):
        assert without_costs(ours) == without_costs(theirs)


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


# ---- whole networks over the devices -----------------------------------------------------------


@pytest.fixture(scope="session")
def split(pictures):
    return Split(pictures["image"][40:], pictures["target"][40:], np.arange(8).astype(str))


@pytest.fixture
def network(tmp_path, make_training, pictures, split):
    """`make(name, seed, devices=4, optimizer=)`: 20 updates of low and high in 4 epochs.

    Its head is drawn by its seed; images are the same for all.
    """

    def make(name, seed, devices=4, optimizer="adamw"):
        group = {"weight_decay": 0.1, "clip": 1.0}
        optim = {"name": optimizer, "momentum": 0.9, "low": group, "high": group}
        base = make_training(optim=optim, ema=0.5, dropout=0.2)
        (tmp_path / name).mkdir(exist_ok=True)
        variables = jax.tree.map(np.copy, base.variables)
        head = variables["params"]["head"]
        drawn = np.random.default_rng(seed).standard_normal(head["kernel"].shape, np.float32)
        variables["params"]["head"] = {**head, "kernel": 0.1 * drawn}
        train = {key: array[:40] for key, array in pictures.items()}
        training = Training(
            phases=[TrainingPhase(0, base.parts)],
            feed=Feed({"train": train}),
            val=split,
            task=TASK,
            settings=LoopSettings(EPOCHS, 0, 8, 0, "loss", seed),
            schedules={"high": lambda step: 0.01},
            mesh=data_mesh(devices),
        )
        own = dataclasses.replace(base, variables=variables)
        return Member(own, tmp_path / name, training)

    return make


def last_state(member):
    template = jax.eval_shape(member.base.state)
    with Checkpoints(member.folder / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_last(template)[0]


# What single runs came to, by seed and optimizer.
_SINGLE: dict = {}


@pytest.fixture
def single(network):
    """The history of a seed that trains by itself on one device, and its last parameters."""

    def find(seed, optimizer):
        if (seed, optimizer) not in _SINGLE:
            one = network(f"single{seed}", seed, devices=1, optimizer=optimizer)
            history = trained([one], alone=True)[0]
            _SINGLE[seed, optimizer] = history, jax.tree.map(np.asarray, last_state(one).params)
        return _SINGLE[seed, optimizer]

    return find


# Adam divides by the size of a gradient, be it mere rounding: a program that adds in another order
# is compared under SGD.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "program", "optimizer"),
    [
        (1, "turns", "adamw"),
        (3, "vmap", "sgd"),
        (4, "auto", "adamw"),
        (8, "turns", "adamw"),
        (6, "scan", "adamw"),
        (5, "unroll", "adamw"),
    ],
)
def test_members_over_four_devices_equal_the_single_runs(
    network, single, count, program, optimizer
):
    members = [network(f"member{seed}", seed, optimizer=optimizer) for seed in range(count)]
    found = trained(members, program=program)
    assert int(last_state(members[0]).step) == 20
    for seed, (member, history) in enumerate(zip(members, found, strict=True)):
        wanted, params = single(seed, optimizer)
        assert_same(history, wanted)
        ends = jax.tree.leaves(last_state(member).params), jax.tree.leaves(params)
        for ours, theirs in zip(*ends, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert len({history[-1]["train_loss"] for history in found}) == count


@pytest.mark.parametrize(
    ("count", "devices", "rows"),
    [
        (1, 4, [(0,)]),
        (3, 4, [(0,), (1,), (2,)]),
        (4, 4, [(0,), (1,), (2,), (3,)]),
        (5, 4, [(0, 1), (2, 3), (4, 4)]),
        (8, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (3, 1, [(0, 1, 2)]),
    ],
)
def test_a_layout_uses_no_more_devices_than_shorten_the_work(count, devices, rows):
    layout = make_layout(count, jax.devices()[:devices])
    assert list(layout.rows) == rows
    assert sorted(layout.places()) == list(range(count))
    turned = [row for turn in layout.turns() for row in turn.rows]
    assert {member for row in turned for member in row} == set(range(count))


def test_members_interrupted_between_epochs_end_as_if_nothing_had_happened(network):
    whole = trained([network(f"whole{seed}", seed) for seed in range(3)], program="vmap")
    halved = [network(f"halved{seed}", seed) for seed in range(3)]
    trained([one.until(2) for one in halved], program="vmap")
    # Asked for none, which is in turns for these, it goes on with the one that it began with.
    found = trained(halved)
    assert without_costs(found[2]) == without_costs(whole[2])
    assert {record["program"] for record in found[2]} == {"vmap"}


def test_members_go_on_in_another_program_that_is_named(network):
    begun = [network(f"begun{seed}", seed) for seed in range(2)]
    trained([one.until(2) for one in begun], program="vmap")
    found = trained(begun, program="turns")
    assert [record["program"] for record in found[1]] == ["vmap"] * 2 + ["turns"] * (EPOCHS - 2)


def test_members_that_do_not_fit_are_refused_in_one_line(network, monkeypatch):
    monkeypatch.setattr(program, "_free_bytes", lambda devices: 10_000)
    members = [network(f"large{seed}", seed) for seed in range(2)]
    with pytest.raises(UserError, match=r"2 members do not fit.*train.program=turns"):
        trained(members, program="vmap")


def test_a_trial_chooses_one_of_the_programs_and_says_so(network, capsys):
    found = trained([network(f"trial{seed}", seed) for seed in range(2)], program="fastest")
    assert found[0][0]["program"] in PROGRAMS
    said = capsys.readouterr().out
    assert f"chosen: {found[0][0]['program']}" in said
    assert all(f"{name} " in said for name in PROGRAMS)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("count", [4, 8])
def test_no_member_talks_to_another(network, count):
    devices = jax.device_count()
    members = [network(f"silent{seed}", seed, devices) for seed in range(count)]
    made = Program([one.training for one in members], 0, "vmap")
    states = [one.base.state() for one in members]
    made.compile(states, [one.training.feed.indices(0, 0, 2, 8) for one in members])
    text = made.compiled.as_text()
    assert f"num_partitions={min(count, devices)}" in text
    assert not [name for name in COLLECTIVES if name in text]


@pytest.mark.slow
def test_eight_members_on_eight_devices_do_not_talk_either():
    test = f"{__file__}::test_no_member_talks_to_another[8]"
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", test]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "MEDTL_JAX_TEST_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
