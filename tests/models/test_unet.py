"""The U-Net: shapes over every backbone, its arithmetic, its weights, and that it learns."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models import registry, unet
from medtl_jax.models.layers import LayerSettings
from medtl_jax.objectives.task import Task
from medtl_jax.weights.pretrained import fill, open_pretrained, save_weights
from medtl_jax.weights.sources import find_weights

WIDTHS = (16, 12, 8, 6, 4)
NAMES = registry.list_models()
# Families that round differently, at sizes that no stride divides.
ODD_SIZES = {
    "baseline_cnn": 45,
    "lenet5": 37,
    "alexnet": 101,
    "googlenet": 101,
    "inception_v3": 161,
    "resnet18": 101,
    "densenet121": 45,
    "efficientnet_lite0": 299,
}


def trace(model, height, width, **call):
    """`(logits, out, variables)` of two images as shapes, without computing anything."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    image = jax.ShapeDtypeStruct((2, height, width, model.in_chans), jnp.float32)
    init = functools.partial(model.init_with_output, **call)
    (logits, out), variables = jax.eval_shape(init, keys, image)
    return logits, out, variables


@functools.cache
def classifier_parts(name):
    spec = registry.model_spec(name)
    return tuple(stage for stage in spec.stages if stage != "features")


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_pixel_over_every_backbone(name):
    model, spec = registry.create_model(name, 3, in_chans=1, decoder=WIDTHS)
    size = spec.smallest_input
    logits, out, variables = trace(model, size, size)
    assert (logits.shape, logits.dtype) == ((2, size, size, 3), jnp.float32)
    assert set(variables) == {"params", "batch_stats"}
    assert spec.stages == classifier_parts(name) and spec.new_parts == ("decoder", "head")
    assert set(variables["params"]) == {*spec.stages, *spec.new_parts}
    assert set(variables["batch_stats"]) <= {*spec.stages, "decoder"}
    assert variables["params"]["head"]["kernel"].shape == (1, 1, WIDTHS[-1], 3)
    assert set(out) == {*spec.stages, "features"}
    assert out["features"].shape == (2, out[spec.stages[-1]].shape[-1])


@pytest.mark.parametrize("name", ODD_SIZES)
def test_odd_oblongs_in_bfloat16(name):
    model, _ = registry.create_model(name, 2, decoder=WIDTHS, dtype=jnp.bfloat16)
    height = ODD_SIZES[name]
    logits, out, variables = trace(model, height, height + 10, train=True)
    assert (logits.shape, logits.dtype) == ((2, height, height + 10, 2), jnp.float32)
    assert {out[name].dtype for name in out} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_values_of_the_decoder_of_resnet18():
    model, _ = registry.create_model("resnet18", 2, decoder=(256, 128, 64, 32, 16))
    params = registry.variable_shapes(model, 224)["params"]
    # Of a block: the projection, two 3x3 kernels, and their scales and shifts.
    coarse, skips, widths = (512, 256, 128, 64), (256, 128, 64, 64), (256, 128, 64, 32)
    blocks = sum(
        a * w + 9 * (w + s) * w + 9 * w * w + 4 * w
        for a, s, w in zip(coarse, skips, widths, strict=True)
    )
    # Over 2x2 pixels: 32 channels and 4 of 3 colours each -> 4 of 16 channels.
    image = 9 * (32 + 12) * 64 + 2 * 64
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params["decoder"]))
    assert found == blocks + image
    assert set(params["decoder"]) == {"up1", "up2", "up3", "up4", "image"}


def test_surplus_widths_are_those_of_the_coarsest_maps():
    model, _ = registry.create_model("vgg11", 2, decoder=(256, 128, 64, 32, 16))
    params = registry.variable_shapes(model, 32)["params"]["decoder"]
    found = [params[name]["conv2"]["conv"]["kernel"].shape[-1] for name in sorted(params)]
    assert found == [128, 64, 32, 16]  # VGG's first map is as large as the image


def test_too_few_widths_are_refused_with_the_number_wanted():
    model, _ = registry.create_model("efficientnet_lite0", 2, decoder=(32, 16))
    with pytest.raises(UserError, match=r"model.decoder=32,16: .* has 5 sizes .* write 5 numbers"):
        registry.variable_shapes(model, 64)


@pytest.mark.parametrize("text", ["", "64,", "a", "64;32", "64,0", "64,-1", "5000", "1.5"])
def test_widths_that_are_none(text):
    with pytest.raises(UserError, match=rf"model.decoder={text}.*: write numbers of channels"):
        unet.parse_widths(text)


def test_widths():
    assert unet.parse_widths(" 64, 32,16") == (64, 32, 16)
    with pytest.raises(UserError, match=r"model\.decoder=64,0: write numbers"):
        registry.create_model("resnet18", 2, decoder=(64, 0))


def test_auxiliary_heads_beside_a_decoder_are_refused():
    with pytest.raises(UserError, match=r"model\.auxiliary: .* classify whole images"):
        registry.create_model("googlenet", 2, decoder=WIDTHS, auxiliary=True)


# Rows (and columns) of a map, of the larger one, and the place of each of the larger's pixels.
ROWS = {
    "stride 2": (2, [0, 0, 1, 1]),
    "stride 2, rounded up": (2, [0, 0, 1]),
    "stride 2, rounded down": (2, [0, 0, 1, 1, 1]),
    "valid convolution and stride 2": (2, [0, 0, 0, 0, 1, 1, 1, 1, 1]),
    "stride 4": (3, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]),
    "valid convolution": (5, [0, 0, 1, 2, 3, 4, 4]),
    "equal": (3, [0, 1, 2]),
}


@pytest.mark.parametrize("case", ROWS)
def test_upsampling_repeats_pixels_about_the_centre(case):
    size, places = ROWS[case]
    x = np.arange(size * 2 * 2, dtype=np.float32).reshape(1, size, 2, 2)
    rows = unet.upsample(jnp.asarray(x), len(places), 2)
    np.testing.assert_array_equal(rows, x[:, places])
    columns = unet.upsample(jnp.asarray(x.transpose(0, 2, 1, 3)), 2, len(places))
    np.testing.assert_array_equal(columns, x.transpose(0, 2, 1, 3)[:, :, places])


def test_blocks_of_pixels_and_back():
    image = np.arange(3 * 5 * 2, dtype=np.float32).reshape(1, 3, 5, 2)
    blocks = unet.blocks_of_pixels(jnp.asarray(image))
    assert blocks.shape == (1, 2, 3, 8)
    np.testing.assert_array_equal(blocks[0, 0, 1], [4, 5, 6, 7, 14, 15, 16, 17])
    np.testing.assert_array_equal(blocks[0, 1, 2], [28, 29] * 4)  # the corner, repeated
    np.testing.assert_array_equal(unet.pixels_of_blocks(blocks, 3, 5), image)


def test_a_block_against_sums_written_out():
    rng = np.random.default_rng(0)
    x, skip = rng.standard_normal((1, 2, 3, 4)), rng.standard_normal((1, 4, 6, 2))
    block = unet.UpBlock(3, LayerSettings(eps=1e-3))
    x32, skip32 = jnp.asarray(x, jnp.float32), jnp.asarray(skip, jnp.float32)
    shapes = jax.eval_shape(
        functools.partial(block.init, update=False), jax.random.key(0), x32, skip32
    )
    variables = jax.tree.map(lambda leaf: rng.uniform(0.2, 1.0, leaf.shape), shapes)

    def conv_norm_relu(x, name):
        params, stats = variables["params"][name], variables["batch_stats"][name]["norm"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = sum(
            padded[:, i : i + 4, j : j + 6] @ params["conv"]["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-3)
        return np.maximum(y * params["norm"]["scale"] + params["norm"]["bias"], 0)

    large = (x @ variables["params"]["project"]["kernel"][0, 0]).repeat(2, 1).repeat(2, 2)
    expected = conv_norm_relu(np.concatenate([large, skip], -1), "conv1")
    expected = conv_norm_relu(expected, "conv2")
    assert (expected > 0).any()
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    found = jax.jit(functools.partial(block.apply, update=False))(narrow, x32, skip32)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-4)


def tiny_net(tiny_model, **fields):
    """`(model, spec, variables)` with maps of 8 and 4 pixels of an image of 16."""
    model, spec = tiny_model(2, decoder=(6, 4), momentum=0.5, **fields)
    return model, registry.with_decoder(spec), registry.initialize(model, 16, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def training_gradients(model, frozen, variables, image):
    def loss(params):
        (logits, _), moved = model.apply(
            {**variables, "params": params},
            image,
            True,
            frozen,
            rngs={"dropout": jax.random.key(2)},
            mutable=["batch_stats"],
        )
        return jnp.square(logits - image[..., :1]).mean(), moved["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def test_the_gradient_reaches_every_parameter(tiny_model):
    model, _, variables = tiny_net(tiny_model)
    image = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    gradients, _ = training_gradients(model, (), variables, image)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("frozen", [("stem", "stage1", "stage2"), ("stage1", "decoder")])
def test_statistics_of_frozen_parts_stay_and_the_others_move(tiny_model, frozen):
    model, _, variables = tiny_net(tiny_model)
    image = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    _, moved = training_gradients(model, frozen, variables, image)
    assert set(moved) == {"stem", "stage1", "stage2", "decoder"}
    for part, statistics in variables["batch_stats"].items():
        same = jax.tree.map(np.array_equal, statistics, moved[part])
        assert set(jax.tree.leaves(same)) == {part in frozen}, part


def test_dropout_takes_whole_channels_of_the_deepest_map(tiny_model):
    model, spec, variables = tiny_net(tiny_model, dropout=0.5)
    image = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
    frozen = spec.stages

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def logits(train, frozen, key):
        rngs = {"dropout": key}
        return model.apply(variables, image, train, frozen, rngs=rngs, mutable=["batch_stats"])[0][
            0
        ]

    first, second = (logits(True, frozen, jax.random.key(seed)) for seed in (3, 4))
    assert float(jnp.abs(first - second).max()) > 0
    quiet = [logits(True, (*frozen, "decoder"), jax.random.key(seed)) for seed in (3, 4)]
    np.testing.assert_array_equal(*quiet)
    np.testing.assert_array_equal(quiet[0], logits(False, (), jax.random.key(5)))
    ones = jnp.ones((1, 4, 4, 64))
    decoder = unet.Decoder((), 0.5, LayerSettings())
    rngs = {"dropout": jax.random.key(0)}
    dropped = decoder.apply({}, ones[..., :3], [ones], update=True, rngs=rngs)
    assert set(np.unique(dropped)) == {0.0, 2.0}
    np.testing.assert_array_equal(dropped, jnp.broadcast_to(dropped[:, :1, :1], ones.shape))


def test_pretrained_maps_under_the_decoder_are_those_of_the_classifier():
    path = find_weights("efficientnet_lite0", "imagenet", lambda *_: None)
    weights = open_pretrained(registry.model_spec("efficientnet_lite0"), path)
    image = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    maps, kept = [], []
    for fields, dont_load in (({}, ()), ({"decoder": WIDTHS}, ("params/head/.*",))):
        model, _ = registry.create_model("efficientnet_lite0", 1000, **fields)
        filled, report = fill(registry.variable_shapes(model, 64), weights, dont_load=dont_load)
        filled = jax.tree.map(zeros_for_shapes, filled)
        maps.append(jax.jit(lambda v, x, m=model: m.apply(v, x)[1]["stage7"])(filled, image))
        kept.append({name.split("/")[1] for name in report.kept})
        assert (report.skipped == {}) == (not fields)
    np.testing.assert_array_equal(*maps)
    assert kept == [set(), {"decoder", "head"}]
    assert {name.split("/")[1] for name in report.skipped} == {"features", "head"}
    assert "not taken from the file: params/features/" in str(report)


def zeros_for_shapes(leaf):
    return jnp.zeros(leaf.shape) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def test_a_saved_network_comes_back_with_its_decoder_and_head(tiny_model, tmp_path):
    model, spec, variables = tiny_net(tiny_model)
    task = Task("segment", ("background", "vessel"))
    save_weights(tmp_path / "unet.safetensors", variables, spec, task)
    plain_model, plain = tiny_model(2)
    weights = open_pretrained(plain, tmp_path / "unet.safetensors")
    shapes = registry.variable_shapes(model, 16)
    filled, report = fill(shapes, weights)
    jax.tree.map(np.testing.assert_array_equal, filled, variables)
    assert report.kept == report.skipped == {}
    new = [f"(params|batch_stats)/{part}/.*" for part in spec.new_parts[:1]]
    _, report = fill(shapes, weights, dont_load=[*new, "params/head/.*"])
    assert {name.split("/")[1] for name in report.kept} == set(spec.new_parts)
    # Under a classifier the decoder is left out, but the layers before the head are missed.
    shapes = registry.variable_shapes(plain_model, 16)
    with pytest.raises(UserError, match=r"missing from the file \(\w+/features/"):
        fill(shapes, weights, dont_load=["params/head/.*"])
    _, report = fill(
        shapes, weights, dont_load=["params/head/.*", "(params|batch_stats)/features/.*"]
    )
    assert "decoder" in {name.split("/")[1] for name in report.skipped}


def test_a_tiny_network_learns_to_copy_a_mask(tiny_model, optax_promotion):
    model, _, variables = tiny_net(tiny_model, dropout=0.0, drop_path=0.0)
    optimizer = optax.adam(0.02)
    rng = np.random.default_rng(0)
    # Lines one pixel wide: what a decoder that ends at half the size cannot draw.
    masks = (rng.random((40, 16, 16)) < 0.1) | (rng.random((40, 16, 1)) < 0.15)
    images = (masks[..., None] * 2.0 - 1.0 + 0.3 * rng.standard_normal((40, 16, 16, 3))).astype(
        np.float32
    )

    @jax.jit
    def step(params, statistics, state, image, mask):
        def loss(params):
            (logits, _), moved = model.apply(
                {"params": params, "batch_stats": statistics}, image, True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, mask)
            return losses.mean(), moved["batch_stats"]

        gradients, statistics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), statistics, state

    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    for number in range(80):
        rows = np.arange(8) + number % 4 * 8
        params, statistics, state = step(
            params, statistics, state, images[rows], masks[rows].astype(np.int32)
        )
    logits, _ = jax.jit(model.apply)({"params": params, "batch_stats": statistics}, images[32:])
    found, true = np.asarray(logits.argmax(-1)) == 1, masks[32:]
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.95
