"""Checkpoints: round trips to the bit, refusals in one line, and survival of interruptions."""

import functools
import gc
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medtl_jax.errors import UserError
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.step import TrainState, evaluation_variables, train_step

PARAMS = {
    "stem": {"kernel": np.array([[-0.0, 1e-42, np.inf], [0.1, 2.0, -3.5]], np.float32)},
    "head": {"bias": np.array([1.0, 2.0], np.float32)},
}


def make_state(ema=False, step=3, params=PARAMS, optimizer=None):
    optimizer = optimizer or optax.multi_transform(
        {"adam": optax.adam(1e-3), "none": optax.set_to_zero()}, {"stem": "none", "head": "adam"}
    )
    params = jax.tree.map(jnp.array, params)
    stats = {"stem": {"mean": jnp.array([0.5, -0.5])}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats=stats,
        opt_state=optimizer.init(params),
        ema={"params": jax.tree.map(jnp.copy, params), "batch_stats": stats} if ema else None,
        phase=jnp.int32(1),
    )


def history(epochs):
    return [{"epoch": e, "val_loss": 1 / e, "val_auc": None} for e in range(1, epochs + 1)]


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_to_the_bit(tmp_path, ema):
    state, variables = make_state(ema), evaluation_variables(make_state(ema))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, history(1), variables)
    template = jax.eval_shape(lambda: make_state(ema, step=0))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        found, log = checkpoints.restore_last(template)
        assert_same(found, state)
        assert log == history(1) == checkpoints.history()
        assert_same(checkpoints.restore_best(1, evaluation_variables(template)), variables)


def test_last_moves_on_and_best_stays(tmp_path):
    with Checkpoints(tmp_path, every=0.0) as checkpoints:
        assert checkpoints.restore_last(make_state()) is None
        for epoch in (1, 2, 3, 4):
            best = {"value": jnp.float32(epoch)} if epoch in (1, 2, 3) else None
            checkpoints.save(epoch, make_state(step=epoch), history(epoch), best)
        found, log = checkpoints.restore_last(make_state())
        assert int(found.step) == 4 and len(log) == 4
        template = {"value": jnp.float32(0)}
        # One older best is kept: a run killed before the next `last` still needs it.
        for epoch in (2, 3):
            assert float(checkpoints.restore_best(epoch, template)["value"]) == epoch
        for epoch in (1, 4):
            with pytest.raises(UserError, match=f"best has no checkpoint of epoch {epoch}$"):
                checkpoints.restore_best(epoch, template)
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["4"]


def test_epochs_of_a_moment_are_held_and_written_at_the_end(tmp_path):
    template = {"value": jnp.float32(0)}
    with pytest.raises(RuntimeError), Checkpoints(tmp_path, every=3600.0) as checkpoints:
        for epoch in (1, 2, 3):
            state = make_state(step=epoch)
            best = {"value": jnp.float32(epoch)} if epoch < 3 else None
            checkpoints.save(epoch, state, history(epoch), best)
            # As the next step does with what was donated to it.
            jax.tree.map(lambda leaf: leaf.delete(), (state, best))
        assert not list((tmp_path / "last").iterdir())
        raise RuntimeError("whatever ends the training")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        found, log = checkpoints.restore_last(make_state())
        assert int(found.step) == 3 and len(log) == 3
        assert float(checkpoints.restore_best(2, template)["value"]) == 2
        with pytest.raises(UserError, match="no checkpoint of epoch 1"):
            checkpoints.restore_best(1, template)


def test_nothing_to_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist: that run saved no checkpoint$"):
        Checkpoints(tmp_path / "none", read_only=True)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="train that run"):
        checkpoints.history()


@pytest.mark.parametrize(
    ("template", "difference"),
    [
        (
            make_state(params={**PARAMS, "top": np.ones(2, np.float32)}, optimizer=optax.adam(1)),
            "opt_state/",
        ),
        (
            make_state(params={**PARAMS, "head": {"bias": np.ones(5, np.float32)}}),
            r"opt_state/.* is float32\(2,\), not float32\(5,\) \(3 differences\)",
        ),
        (
            make_state(params={**PARAMS, "head": {"bias": np.ones(2, np.float16)}}),
            r"opt_state/.* is float32\(2,\), not float16\(2,\) \(3 differences\)",
        ),
        (make_state(ema=True), r"ema/batch_stats/stem/mean is missing \(3 differences\)"),
        (
            make_state().replace(batch_stats={}),
            r"batch_stats/stem/mean is not of this model \(1 differences\)",
        ),
    ],
    ids=["another optimizer", "shape", "dtype", "missing", "surplus"],
)
def test_another_model_is_refused_with_a_difference(tmp_path, template, difference):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), history(1), None)
        with pytest.raises(UserError, match="does not fit this model and config: " + difference):
            checkpoints.restore_last(template)


# When the read of one array fails, orbax drops those of the others unfinished, and Python says so
# whenever it comes to collect them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collect_here():
    """Collects what orbax dropped while these tests' filters are still in force."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(), history(1), {"kernel": jnp.arange(6.0)})
    return folder


def damaged_copies(intact, folder):
    """`(relative name, kind)` for every file, deleted or cut, with the copy in `folder`."""
    for file in sorted(path for path in intact.rglob("*") if path.is_file()):
        for kind in ("deleted", "cut"):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(intact, folder)
            victim = folder / file.relative_to(intact)
            if kind == "deleted":
                victim.unlink()
            else:
                victim.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            yield file.relative_to(intact), kind


def test_damage_is_one_line_and_never_other_values(tmp_path, intact):
    refused = set()
    for name, kind in damaged_copies(intact, tmp_path / "copy"):
        try:
            with Checkpoints(tmp_path / "copy", read_only=True) as checkpoints:
                state, log = checkpoints.restore_last(make_state())
                best = checkpoints.restore_best(1, {"kernel": jnp.zeros(6)})
        except UserError as error:
            folder = name.parts[0]
            text = str(error)
            assert text.startswith(f"checkpoint {tmp_path / 'copy' / folder / '1'} is damaged (")
            assert text.endswith(f"delete {tmp_path / 'copy'} to train anew")
            refused.add((folder, name.parts[-1], kind))
        else:
            assert_same(state, make_state())
            assert log == history(1)
            np.testing.assert_array_equal(best["kernel"], np.arange(6.0))
    for folder in ("last", "best"):
        assert {(folder, "_METADATA", kind) for kind in ("deleted", "cut")} <= refused
        assert {(folder, "manifest.ocdbt", kind) for kind in ("deleted", "cut")} <= refused
    assert {("last", "metadata", kind) for kind in ("deleted", "cut")} <= refused


@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_donation_right_after_a_save_does_not_change_what_is_written(
    tmp_path, make_training, pictures, every
):
    training = make_training(ema=0.9)
    step = jax.jit(functools.partial(train_step, parts=training.parts), donate_argnums=0)
    batch = {name: jnp.asarray(array[:16]) for name, array in pictures.items()}
    state, _ = step(training.state(), batch, jax.random.key(0))
    saved = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, every=every) as checkpoints:
        checkpoints.save(1, state, history(1), evaluation_variables(state))
        after, _ = step(state, batch, jax.random.key(0))
        assert jax.tree.leaves(state.params)[0].is_deleted()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        found, _ = checkpoints.restore_last(after)
        best = checkpoints.restore_best(1, evaluation_variables(after))
    assert_same(found, saved)
    assert_same(best, evaluation_variables(saved))


def leave_unfinished(folder: pathlib.Path, epoch: int) -> pathlib.Path:
    """What a write that was killed leaves behind."""
    part = folder / f"{epoch}.orbax-checkpoint-tmp"
    (part / "tree").mkdir(parents=True)
    (part / "tree" / "_METADATA").write_text("{")
    return part


def test_an_interrupted_write_is_not_seen_and_is_cleaned_up(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), history(1), {"value": jnp.float32(1)})
    parts = [leave_unfinished(tmp_path / name, 2) for name in ("last", "best")]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert len(checkpoints.history()) == 1
    assert all(part.exists() for part in parts)  # a reader changes nothing
    with Checkpoints(tmp_path) as checkpoints:
        assert len(checkpoints.restore_last(make_state())[1]) == 1
        checkpoints.save(2, make_state(step=9), history(2), {"value": jnp.float32(2)})
        assert int(checkpoints.restore_last(make_state())[0].step) == 9
        assert float(checkpoints.restore_best(2, {"value": jnp.float32(0)})["value"]) == 2
    assert not any(part.exists() for part in parts)


def test_a_best_of_a_future_that_was_lost_is_replaced(tmp_path):
    with Checkpoints(tmp_path, every=0.0) as checkpoints:
        for epoch in (1, 2, 3):
            checkpoints.save(epoch, make_state(), history(epoch), {"value": jnp.float32(epoch)})
    shutil.rmtree(tmp_path / "last")
    with Checkpoints(tmp_path, every=0.0) as checkpoints:
        checkpoints.save(1, make_state(), history(1), {"value": jnp.float32(10)})
        assert float(checkpoints.restore_best(1, {"value": jnp.float32(0)})["value"]) == 10
        with pytest.raises(UserError, match="no checkpoint of epoch 3"):
            checkpoints.restore_best(3, {"value": jnp.float32(0)})
