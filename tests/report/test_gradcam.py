"""Grad-CAM against closed forms, its choices, its refusals, and the check with random weights."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from medtl_jax.errors import UserError
from medtl_jax.models import registry
from medtl_jax.models.inputs import normalize
from medtl_jax.objectives.task import Task
from medtl_jax.report import gradcam

SIDE = 32
CLASSES = ("a", "b", "c", "d")


@functools.cache
def network(outputs=4):
    """`(model, spec, variables)`: its logits are linear in the mean of `stage1`, and about 0."""
    spec = registry.model_spec("baseline_cnn")
    model = spec.build(outputs, widths=(4, 6))
    variables = registry.initialize(model, SIDE, jax.random.key(1))
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((6, outputs)).astype(np.float32)
    _, out = jax.jit(model.apply)(variables, normalize(pictures(), spec.input))
    bias = -np.median(np.asarray(out["features"]) @ kernel, axis=0)
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    return model, spec, {**variables, "params": {**variables["params"], "head": head}}


def pictures(count=5):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3))
    noise = rng.integers(-20, 20, (count, SIDE, SIDE, 3))
    return np.clip(coarse.repeat(8, 1).repeat(8, 2) + noise, 0, 255).astype(np.uint8)


@functools.cache
def forward(outputs=4):
    """float64 logits `[n, outputs]` and the maps of `stage1` `[n, 16, 16, 6]`."""
    model, spec, variables = network(outputs)
    logits, out = jax.jit(model.apply)(variables, normalize(pictures(), spec.input))
    return np.asarray(logits, np.float64), np.asarray(out["stage1"], np.float64)


def interpolated(cam):
    """`[16, 16]` -> `[32, 32]`, bilinear between the centres of the pixels."""
    places = (np.arange(SIDE) + 0.5) * len(cam) / SIDE - 0.5
    rows = np.stack([np.interp(places, np.arange(len(cam)), column) for column in cam.T], 1)
    return np.stack([np.interp(places, np.arange(len(cam)), row) for row in rows])


def expected_maps(weights):
    """Maps of scores whose derivatives for the channels' means are `weights` `[n, 6]`."""
    cams = np.maximum((forward()[1] * weights[:, None, None]).sum(-1), 0)
    large = np.stack([interpolated(cam) for cam in cams])
    return large / large.max((1, 2), keepdims=True)


def head_kernel(outputs=4):
    return np.asarray(network(outputs)[2]["params"]["head"]["kernel"], np.float64)


@pytest.mark.parametrize("name", ["classify", "multilabel"])
@pytest.mark.parametrize("target", [2, np.array([0, 1, 2, 3, 0]), None])
def test_a_linear_head_gives_the_class_activation_map(name, target):
    # Zhou et al. 2016: the channels weighted by the head's weights for the class.
    model, spec, variables = network()
    chosen = forward()[0].argmax(-1) if target is None else np.broadcast_to(target, 5)
    assert len(set(chosen)) > 1 or target is not None
    found = gradcam.grad_cam(model, variables, spec, pictures(), target, Task(name, CLASSES))
    assert (found.shape, found.dtype) == ((5, SIDE, SIDE), np.float32)
    np.testing.assert_allclose(found, expected_maps(head_kernel()[:, chosen].T), atol=1e-4)
    np.testing.assert_allclose(found.max((1, 2)), 1.0, rtol=1e-6)
    assert found.min() == 0.0


def test_a_number_is_chosen_by_its_index():
    model, spec, variables = network()
    task = Task("regress", CLASSES, mean=(1.0, 2.0, 3.0, 4.0), std=(9.0, 9.0, 9.0, 9.0))
    found = gradcam.grad_cam(model, variables, spec, pictures(), 3, task)
    weights = np.broadcast_to(head_kernel()[:, 3], (5, 6))
    np.testing.assert_allclose(found, expected_maps(weights), atol=1e-4)
    with pytest.raises(ValueError, match="which of a, b, c, d to explain"):
        gradcam.grad_cam(model, variables, spec, pictures(), None, task)


def expected_rank(logits, kind):
    """The sum of P(y > j), as the two models define it."""
    if kind == "corn":
        return special.expit(logits).cumprod(-1).sum(-1)
    falls = np.concatenate([np.zeros_like(logits[:, :1]), np.log1p(np.exp(logits[:, 1:]))], -1)
    return special.expit(logits[:, :1] - falls.cumsum(-1)).sum(-1)


@pytest.mark.parametrize("kind", ["corn", "cumulative"])
def test_an_ordinal_score_is_the_expected_rank(kind):
    model, spec, variables = network()
    task = Task("ordinal", (*CLASSES, "e"), ordinal=kind)
    logits, step = forward()[0], 1e-5 * np.eye(4)
    slopes = np.stack(
        [(expected_rank(logits + e, kind) - expected_rank(logits - e, kind)) / 2e-5 for e in step],
        -1,
    )
    found = gradcam.grad_cam(model, variables, spec, pictures(), None, task)
    np.testing.assert_allclose(found, expected_maps(slopes @ head_kernel().T), atol=1e-4)
    with pytest.raises(ValueError, match="the target must be None"):
        gradcam.grad_cam(model, variables, spec, pictures(), 1, task)


def test_batches_do_not_change_the_maps():
    model, spec, variables = network()
    task = Task("classify", CLASSES)
    find = functools.partial(gradcam.grad_cam, model, variables, spec, pictures(), None, task)
    np.testing.assert_array_equal(find(), find())
    np.testing.assert_allclose(find(batch_size=2), find(batch_size=5), atol=1e-6)


def test_the_stage_can_be_chosen():
    model, spec, variables = network()
    task = Task("classify", CLASSES)
    find = functools.partial(gradcam.grad_cam, model, variables, spec, pictures(), 0, task)
    np.testing.assert_array_equal(find(), find("stage1"))
    assert float(np.abs(find() - find("stem")).max()) > 0.1
    with pytest.raises(UserError, match=r"no stage 'stage9' to explain; .* stem, stage1$"):
        find("stage9")
    with pytest.raises(UserError, match="no stage 'features'"):
        find("features")


@pytest.mark.parametrize("target", [4, -1, 0.5, np.zeros(4, int), np.array([0, 1, 2, 3, 4])])
def test_targets_that_are_none(target):
    model, spec, variables = network()
    with pytest.raises(ValueError, match="target must be an index below 4, or one for each of 5"):
        gradcam.grad_cam(model, variables, spec, pictures(), target, Task("classify", CLASSES))


def test_masks_are_not_explained():
    model, spec, variables = network()
    with pytest.raises(UserError, match="Grad-CAM is of one score an image"):
        gradcam.grad_cam(model, variables, spec, pictures(), 1, Task("segment", CLASSES))


# At 128 pixels the maps of Lite0 have 64, 64, 32, 16, 8, 8, 4 and 4 pixels a side.
STAGES = {
    ("efficientnet_lite0", 224): "stage7",
    ("efficientnet_lite0", 128): "stage5",
    ("vgg11", 224): "stage4",
    ("lenet5", 28): "stage1",
}


@pytest.mark.parametrize(("name", "size"), STAGES)
def test_the_deepest_map_of_seven_positions_is_read(name, size):
    model, _ = registry.create_model(name, 2)
    variables = registry.variable_shapes(model, size)
    assert gradcam.default_stage(model, variables, size, size) == STAGES[name, size]


def test_without_a_fine_map_the_deepest_is_read(tiny_model):
    model, _ = tiny_model(2)
    variables = registry.variable_shapes(model, 8)
    assert gradcam.default_stage(model, variables, 8, 8) == "stage2"


def test_a_tap_adds_to_its_map_and_leaves_no_variables(tiny_model):
    model, _ = tiny_model(2)
    image = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    taps = {"stage1": jnp.full((1, 8, 8, 8), 0.5)}
    plain, tapped = (
        jax.jit(model.init_with_output)(jax.random.key(1), image, taps=taps)
        for taps in (None, taps)
    )
    assert set(tapped[1]) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, plain[1], tapped[1])
    np.testing.assert_allclose(plain[0][1]["stage1"] + 0.5, tapped[0][1]["stage1"], rtol=1e-6)
    assert float(jnp.abs(plain[0][0] - tapped[0][0]).max()) > 0
    with pytest.raises(ValueError, match="taps stage9: the stages are stem, stage1, stage2"):
        jax.eval_shape(
            functools.partial(model.init, taps={"stage9": jnp.zeros(())}), jax.random.key(1), image
        )


def test_the_check_compares_with_the_network_of_new_weights():
    model, spec, variables = network()
    task = Task("classify", CLASSES)
    check = functools.partial(gradcam.randomised_check, model, variables, spec, pictures())
    found = check(None, task, seed=2)
    chosen = forward()[0].argmax(-1)
    real = gradcam.grad_cam(model, variables, spec, pictures(), chosen, task)
    np.testing.assert_array_equal(found.maps, real)
    pairs = zip(found.maps, found.randomised, strict=True)
    expected = [stats.pearsonr(*(stats.rankdata(m) for m in pair)).statistic for pair in pairs]
    np.testing.assert_allclose(found.correlation, expected, rtol=1e-9)
    assert found.mean == pytest.approx(np.mean(expected)) and found.defined == 5
    assert found.randomised.min() == 0 and found.randomised.max() == pytest.approx(1)
    np.testing.assert_array_equal(check(None, task, seed=2).randomised, found.randomised)
    other = check(None, task, seed=3).randomised
    assert float(np.abs(other - found.randomised).max()) > 0.1


def test_weights_that_are_random_already_are_found_out():
    # Were the check to keep anything, the network of the same seed would not agree with itself.
    model, spec, _ = network()
    task = Task("classify", CLASSES)
    images = pictures()
    image = normalize(images, spec.input)
    drawn = registry.initialize(model, SIDE, jax.random.key(7))
    trained = model.clone(momentum=0.0, dropout=0.0)
    moved = jax.jit(lambda v, x: trained.apply(v, x, True, mutable=["batch_stats"])[1])(
        drawn, image
    )
    drawn = {"params": drawn["params"], **moved}
    found = gradcam.randomised_check(model, drawn, spec, images, 0, task, seed=7)
    np.testing.assert_allclose(found.correlation, 1.0, atol=1e-4)
    assert found.mean == pytest.approx(1.0, abs=1e-4)


def test_a_constant_map_has_no_correlation():
    model, spec, variables = network()
    head = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}
    variables = {**variables, "params": {**variables["params"], "head": head}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradcam.randomised_check(
            model, variables, spec, pictures(), 0, Task("classify", CLASSES)
        )
    np.testing.assert_array_equal(found.maps, 0.0)
    assert np.isnan(found.correlation).all() and np.isnan(found.mean) and found.defined == 0


def test_a_deep_network_with_dropout_and_grey_images(tiny_model):
    model, spec = tiny_model(2, dropout=0.5, drop_path=0.5)
    variables = registry.initialize(model, 16, jax.random.key(0))
    grey = pictures(3)[:, ::2, ::2, :1]
    task = Task("regress", ("age",), mean=(50.0,), std=(9.0,))
    found = gradcam.randomised_check(model, variables, spec, grey, None, task, batch_size=2)
    assert found.maps.shape == found.randomised.shape == (3, 16, 16)
    assert np.isfinite(found.randomised).all() and found.randomised.max() == pytest.approx(1)
