"""Exact statistics of the batch norms against float64 NumPy, by whatever way the images come."""

import copy

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from medtl_jax.data.streams import Streamed
from medtl_jax.models.backbone import Backbone
from medtl_jax.models.classic import BaselineCNN
from medtl_jax.models.inputs import normalize
from medtl_jax.models.layers import DropPath, LayerSettings, make_norm
from medtl_jax.models.registry import initialize, model_spec
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.reestimate import batches_of_all, make_reestimate

SPEC = model_spec("baseline_cnn")
MODEL = BaselineCNN(2, widths=(3, 4))
BOTH = ("stem", "stage1")
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
ORDER = np.arange(16, dtype=np.int32)
HALVES = ORDER.reshape(2, 8)


@pytest.fixture(scope="module")
def variables():
    """Of a network whose stored statistics are far from those of the images."""
    found = jax.tree.map(np.array, initialize(MODEL, 8, jax.random.key(0)))
    rng = np.random.default_rng(1)
    for stage in BOTH:
        norm = found["batch_stats"][stage]["conv1"]["norm"]
        norm["mean"] = rng.standard_normal(norm["mean"].shape).astype(np.float32)
        norm["var"] = rng.uniform(5, 9, norm["var"].shape).astype(np.float32)
    found["batch_stats"]["stem"]["conv1"]["norm"]["mean"][0] = -0.0
    return found


@pytest.fixture(scope="module")
def run():
    return make_reestimate(MODEL, SPEC, BOTH, data_mesh())


def convolved(variables, stage, x):
    """float64 `[b, h, w, o]`: what the norm of a stage reads; `x` `[b, h, w, c]`."""
    kernel = variables["params"][stage]["conv1"]["conv"]["kernel"].astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)


def stage1_reads(variables, x, mean, var):
    """The map before `stage1`'s norm, where the stem's norm uses these statistics."""
    norm = variables["params"]["stem"]["conv1"]["norm"]
    y = (x - mean) / np.sqrt(var + MODEL.eps) * norm["scale"] + norm["bias"]
    y = np.maximum(y, 0).reshape(len(x), 4, 2, 4, 2, -1).max((2, 4))
    return convolved(variables, "stage1", y)


def moments(x):
    return x.mean((0, 1, 2)), x.var((0, 1, 2))


def check(variables, stage, wanted, rtol=1e-5):
    norm = variables["batch_stats"][stage]["conv1"]["norm"]
    np.testing.assert_allclose(norm["mean"], wanted[0], rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(norm["var"], wanted[1], rtol=rtol)


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def test_one_batch_gives_the_statistics_of_the_whole_set(variables, run):
    found = run(variables, IMAGES, ORDER[None])
    first = convolved(variables, "stem", np.asarray(normalize(IMAGES, SPEC.input), np.float64))
    check(found, "stem", moments(first))
    check(found, "stage1", moments(stage1_reads(variables, first, *moments(first))))
    assert bits(found["params"]) == bits(variables["params"])


def test_batches_are_combined_to_the_moments_of_all(variables, run):
    found = run(variables, IMAGES, HALVES)
    first = convolved(variables, "stem", np.asarray(normalize(IMAGES, SPEC.input), np.float64))
    # Of the first norm, the batches together are the set.
    check(found, "stem", moments(first))
    # The second sees maps that were normalised batch by batch.
    parts = [stage1_reads(variables, first[rows], *moments(first[rows])) for rows in HALVES]
    mean, var = (np.stack(values) for values in zip(*map(moments, parts), strict=True))
    total = (var + mean**2).mean(0) - mean.mean(0) ** 2
    check(found, "stage1", (mean.mean(0), total))


def test_other_stages_keep_theirs_and_are_run_with_them(variables):
    found = make_reestimate(MODEL, SPEC, ("stage1",), data_mesh())(variables, IMAGES, HALVES)
    stem = variables["batch_stats"]["stem"]
    assert bits(found["batch_stats"]["stem"]) == bits(stem)
    first = convolved(variables, "stem", np.asarray(normalize(IMAGES, SPEC.input), np.float64))
    norm = stem["conv1"]["norm"]
    check(found, "stage1", moments(stage1_reads(variables, first, norm["mean"], norm["var"])))


def test_a_mean_far_from_0_costs_no_digits(variables):
    # The mean is 7000 deviations from 0: in float32 `E[x^2] - mean^2` would keep no digit at all.
    maps = np.random.default_rng(2).standard_normal((16, 4, 4, 3)) + 7000
    maps = maps.astype(np.float32)
    identity = np.zeros((3, 3, 3, 4), np.float32)
    identity[1, 1, range(3), range(3)] = 1
    params = copy.deepcopy(variables["params"])
    params["stage1"]["conv1"]["conv"]["kernel"] = identity
    run = make_reestimate(MODEL, SPEC, ("stage1",), data_mesh(), "stage1")
    found = run({**variables, "params": params}, maps, ORDER.reshape(4, 4))
    pooled = maps.reshape(16, 2, 2, 2, 2, 3).max((2, 4)).astype(np.float64)
    norm = found["batch_stats"]["stage1"]["conv1"]["norm"]
    np.testing.assert_allclose(norm["var"][:3], pooled.var((0, 1, 2)), rtol=1e-3)


def test_from_the_maps_before_a_stage(variables):
    _, out = jax.jit(MODEL.apply)(variables, normalize(IMAGES, SPEC.input))
    maps, mesh = np.asarray(out["stem"]), data_mesh()
    found = make_reestimate(MODEL, SPEC, ("stage1",), mesh, "stage1")(variables, maps, HALVES)
    wanted = make_reestimate(MODEL, SPEC, ("stage1",), mesh)(variables, IMAGES, HALVES)
    norm = wanted["batch_stats"]["stage1"]["conv1"]["norm"]
    check(found, "stage1", (norm["mean"], norm["var"]))
    assert bits(found["batch_stats"]["stem"]) == bits(variables["batch_stats"]["stem"])
    with pytest.raises(ValueError, match="the norms of stem are not run"):
        make_reestimate(MODEL, SPEC, BOTH, mesh, "stage1")(variables, maps, HALVES)


def test_every_source_of_images_gives_the_same_bits(variables, run):
    batches = np.random.default_rng(3).permutation(16).reshape(2, 8)
    streamed = Streamed(range(16), lambda row: IMAGES[row], IMAGES.shape[1:])
    wanted = bits(run(variables, IMAGES, batches))
    assert bits(run(variables, jnp.asarray(IMAGES), batches)) == wanted
    assert bits(run(variables, streamed, batches)) == wanted


def test_a_batch_weighs_as_many_images_as_it_has(variables, run):
    found = run(variables, IMAGES, *batches_of_all(14, 8, 0))
    first = convolved(variables, "stem", np.asarray(normalize(IMAGES, SPEC.input), np.float64))
    check(found, "stem", moments(first[:14]))
    both = run(variables, IMAGES, ORDER[None, :8], ORDER[None, 8:])
    wanted = run(variables, IMAGES, HALVES)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@hypothesis.given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9))
def test_batches_of_all_have_each_image_once(count, size, seed):
    found = batches_of_all(count, size, seed)
    assert sorted(np.concatenate([batch.ravel() for batch in found])) == list(range(count))
    wanted = [(count // size, size), (1, count % size)]
    assert [batch.shape for batch in found] == [shape for shape in wanted if all(shape)]


# Whole batches, one that does not divide evenly over four devices, fewer images than these.
@pytest.mark.parametrize("batches", [(HALVES,), batches_of_all(14, 8, 0), batches_of_all(3, 8, 0)])
def test_one_device_and_four_agree(variables, run, batches):
    one = make_reestimate(MODEL, SPEC, BOTH, data_mesh(1))(variables, IMAGES, *batches)
    four = run(variables, IMAGES, *batches)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class DroppingStage(nn.Module):
    """A norm of what dropout and drop-path leave of the image."""

    dropout: float
    drop_path: float
    settings: LayerSettings

    @nn.compact
    def __call__(self, x, *, update):
        x = nn.Dropout(self.dropout, deterministic=not update)(x)
        x = DropPath(self.drop_path)(x, train=update)
        return make_norm(self.settings, "norm")(x, update=update)


class Dropping(Backbone):
    """A network of that one stage."""

    def trunk(self):
        yield "stem", DroppingStage(self.dropout, self.drop_path, self.settings, name="stem")


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"drop_path": 0.5}])
def test_nothing_is_dropped(rates):
    model = Dropping(2, **rates)
    start = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    run = make_reestimate(model, SPEC, ("stem",), data_mesh())
    found = run(start, IMAGES, ORDER[None])["batch_stats"]["stem"]["norm"]
    mean, var = moments(np.asarray(normalize(IMAGES, SPEC.input), np.float64))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["var"], var, rtol=1e-5)


def test_without_norms_or_batches(variables):
    run = make_reestimate(MODEL, SPEC, ("head",), data_mesh())
    assert run(variables, IMAGES, ORDER[None]) is variables
    with pytest.raises(ValueError, match="no batches"):
        run(variables, IMAGES, np.zeros((0, 8), np.int32))
