"""Gradual unfreezing in the loop: what each phase trains, with what, and that it can be resumed."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from epoch_records import Notes, without_costs

from medtl_jax.data.catalog import Split
from medtl_jax.objectives.task import Task
from medtl_jax.training import loop, runner
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import Keeping, LoopSettings, Training, TrainingPhase, fit
from medtl_jax.training.runner import Feed
from medtl_jax.training.selection import task_validator
from medtl_jax.training.step import Average, evaluation_variables

TASK = Task("classify", ("low", "middle", "high"))
# Two epochs each, of three steps.
PHASES = (
    {"frozen": "stem,stage.,features", "low": "", "high": "head"},
    {"frozen": "stem,stage1", "low": "stage2,features", "high": "head"},
    {"frozen": "", "low": "stem,stage.,features", "high": "head"},
)
STEPS, EPOCHS = 3, 6


@dataclasses.dataclass(frozen=True)
class Study:
    """A training in three phases, in a folder, to be begun and continued."""

    phases: tuple
    folder: object
    pictures: dict

    def fit(self, seen=None):
        """`(history, notes)`; the state after each epoch is appended to `seen`."""
        first, console, pictures = self.phases[0], Notes(), self.pictures

        def evaluated(state):
            if seen is not None:
                seen.append(jax.tree.map(np.array, state))
            return evaluation_variables(state)

        training = Training(
            phases=[TrainingPhase(2 * i, one.parts) for i, one in enumerate(self.phases)],
            feed=Feed({"train": pictures}),
            val=Split(pictures["image"][:24], pictures["target"][:24], np.arange(24).astype(str)),
            task=TASK,
            settings=LoopSettings(EPOCHS, 0, 16, 0, "loss", 3),
            schedules={},
            mesh=data_mesh(1),
            evaluated=evaluated,
        )
        predict = make_predict(first.parts.model, first.parts.spec, data_mesh(1), 8)
        with Checkpoints(self.folder / "checkpoints") as checkpoints:
            keeping = Keeping(checkpoints, self.folder, console)
            return fit(training, first.state(), predict, keeping), console.lines

    def last(self):
        """The state in the last checkpoint, by the names of its leaves."""
        last = self.phases[-1]
        template = last.state().replace(opt_state=last.parts.optimizer.init(last.state().params))
        with Checkpoints(self.folder / "checkpoints", read_only=True) as checkpoints:
            return checkpoints.restore_last(template)[0]


@pytest.fixture
def make_study(tmp_path, make_training, pictures):
    def make(name):
        (tmp_path / name).mkdir()
        phases = tuple(
            make_training(groups, ema=0.5, first_step=2 * STEPS * number)
            for number, groups in enumerate(PHASES)
        )
        return Study(phases, tmp_path / name, pictures)

    return make


@pytest.fixture
def watched(monkeypatch):
    """`(phase, what an epoch began with, the program that it ran)` of each epoch."""
    epochs, made = [], []

    class Watched(runner.Runner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def steps(self, state, *arguments):
            before = jax.tree.map(np.array, state)
            result = super().steps(state, *arguments)
            epochs.append((len(made), before, self.compiled))
            return result

    monkeypatch.setattr(loop, "Runner", Watched)
    return epochs


def same(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs]


def test_a_phase_trains_its_stages_alone_with_a_fresh_optimizer_and_one_program(
    make_study, watched
):
    study, seen = make_study("run"), []
    history, notes = study.fit(seen)
    assert [record["phase"] for record in history] == [1, 1, 2, 2, 3, 3]
    assert [line for line in notes if line.startswith("phase")] == [
        "phase 2/3: stage2, features, head",
        "phase 3/3: stem, stage1, stage2, features, head",
    ]

    for number, begun in enumerate((study.phases[0].state(), seen[1], seen[3])):
        after, table = seen[2 * number + 1], study.phases[number].parts.table
        for stage, group in table.items():
            for kind in ("params", "batch_stats"):
                before, now = (getattr(state, kind).get(stage, {}) for state in (begun, after))
                kept = same(before, now)
                assert all(kept) if group == "frozen" else not any(kept), (number, stage, kind)

    # An optimizer that has seen nothing: neither moments nor steps.
    for number, (phase, before, _) in enumerate(watched):
        assert (phase, int(before.phase)) == (number // 2 + 1, number // 2)
        assert int(before.step) == STEPS * number
        anew = [not np.any(leaf) for leaf in jax.tree.leaves(before.opt_state)]
        assert all(anew) if number % 2 == 0 else not any(anew)
    programs = [program for _, _, program in watched]
    assert all(programs[i] is programs[i + 1] for i in (0, 2, 4)) and len(set(programs)) == 3


@pytest.mark.parametrize("lost", [3, 4])
def test_a_run_killed_at_a_boundary_or_within_a_phase_ends_as_a_whole_one(
    make_study, monkeypatch, lost
):
    """The third epoch is the first of the second phase."""
    whole, killed = make_study("whole"), make_study("killed")
    history, _ = whole.fit()
    save = Checkpoints.save

    def interrupted(self, epoch, *content):
        if epoch == lost:
            raise KeyboardInterrupt
        save(self, epoch, *content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", interrupted)
        killed.fit()
    resumed, notes = killed.fit()
    assert notes[0] == f"continuing after epoch {lost - 1}"
    assert ("phase 2/3: stage2, features, head" in notes) == (lost == 3)
    assert without_costs(resumed) == without_costs(history)
    assert all(same(killed.last(), whole.last()))


def test_a_mean_of_the_last_states_by_hand(make_training, pictures):
    """Stochastic weight averaging: each state from the second on counts alike."""
    training = make_training()
    parts = dataclasses.replace(training.parts, average=Average(swa_start=1))
    training = dataclasses.replace(training, parts=parts)
    mesh = data_mesh(1)
    run = runner.Runner(parts, mesh, jax.random.key(7), Feed({"train": pictures}), False)
    state = jax.device_put(training.state(), mesh.replicated)
    states = []
    for first in range(4):
        rows = Feed({"train": pictures}).indices(3, first, 1, 16)
        state, _ = run(state, rows, lambda done, total: None)
        states.append(jax.tree.map(np.array, {"params": state.params, "all": state.ema}))
    # Before the tail it is the last state.
    np.testing.assert_allclose(
        states[0]["all"]["params"]["head"]["kernel"],
        states[0]["params"]["head"]["kernel"],
        rtol=1e-5,
    )
    tail = [one["params"] for one in states[1:]]
    wanted = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *tail)
    jax.tree.map(
        lambda found, mean: np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7),
        states[-1]["all"]["params"],
        wanted,
    )
    assert not np.array_equal(tail[0]["head"]["kernel"], tail[-1]["head"]["kernel"])


def test_what_a_later_phase_freezes_goes_on_in_the_average(make_training, pictures):
    """The average of a head that stands still again goes to the head, not to what lagged behind."""
    groups = {"frozen": "head", "low": "", "high": "stem,stage.,features"}
    run_groups = {"frozen": "", "low": "", "high": "stem,stage.,features,head"}
    whole = make_training(run_groups).parts
    training = make_training(groups, ema=0.5)
    parts = dataclasses.replace(training.parts, run_table=whole.table, run_labels=whole.labels)
    state = training.state()
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + 1.0, state.params["head"])
    state = state.replace(params={**state.params, "head": moved}, step=state.step + 100)
    mesh, feed = data_mesh(1), Feed({"train": pictures})
    run = runner.Runner(parts, mesh, jax.random.key(7), feed, False)
    after, _ = run(
        jax.device_put(state, mesh.replicated), feed.indices(3, 0, 12, 16), lambda *_: None
    )
    for name, leaf in after.params["head"].items():
        np.testing.assert_array_equal(leaf, moved[name])
        np.testing.assert_allclose(after.ema["params"]["head"][name], leaf, atol=1.1 * 0.5**12)


@pytest.mark.parametrize(
    ("first", "swa_start", "best", "epochs", "stalled"),
    [
        (0, None, 1, 3, True),
        (0, None, 2, 3, False),
        # The last phase begins with the third epoch: patience does too.
        (2, None, 1, 3, False),
        (2, None, 1, 4, True),
        # 10 steps an epoch: the average begins in the fourth.
        (0, 30, 1, 4, False),
        (0, 30, 1, 5, True),
    ],
)
def test_patience_begins_with_the_last_phase_and_the_average(
    first, swa_start, best, epochs, stalled
):
    parts = types.SimpleNamespace(average=Average(swa_start=swa_start))
    training = types.SimpleNamespace(
        settings=LoopSettings(9, 0, 16, 2, "loss", 0),
        chosen_by=task_validator("loss", TASK),
        phases=[TrainingPhase(0, None), TrainingPhase(first, parts)],
    )
    history = [{"epoch": i, "val_loss": float(i != best)} for i in range(1, epochs + 1)]
    assert loop._stalled(history, training, 10) == stalled
