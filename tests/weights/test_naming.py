"""Choosing a table for a file's keys, and layouts against their axes: by hand and on real weights.

What the tables say of each model is in test_tables.py.
"""

import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models import inputs
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.naming import (
    CONV_HWIO,
    CONV_OIHW,
    DENSE_OI,
    VECTOR,
    Naming,
    bgr,
    choose_naming,
    flattened,
    to_linen,
)
from medtl_jax.weights.sources import find_weights
from medtl_jax.weights.tables import namings

MODEL = "efficientnet_lite0"


@pytest.fixture(scope="module")
def source():
    return read_weights(find_weights(MODEL, "imagenet")).tensors


@pytest.fixture(scope="module")
def linen(source):
    return to_linen(choose_naming(MODEL, namings(MODEL), list(source)), source)


def test_counts(linen):
    params = {name: a.size for name, a in linen.items() if name.startswith("params/")}
    stats = {name: a.size for name, a in linen.items() if name.startswith("batch_stats/")}
    # 49 norms of 2 + 2, 49 kernels, a dense layer of 2.
    assert (len(params), len(stats), len(linen)) == (149, 98, 247)
    assert sum(params.values()) == 4_652_008
    assert sum(stats.values()) == 42_016


# Tan & Le 2019, table 1: kernel, expansion, channels, repeats of the stages; lite0 scales none.
PUBLISHED = {
    "stage1": (3, 1, 16, 1),
    "stage2": (3, 6, 24, 2),
    "stage3": (5, 6, 40, 2),
    "stage4": (3, 6, 80, 3),
    "stage5": (5, 6, 112, 3),
    "stage6": (5, 6, 192, 4),
    "stage7": (3, 6, 320, 1),
}


def test_shapes_follow_the_published_table(linen):
    channels = 32
    assert linen["params/stem/conv/kernel"].shape == (3, 3, 3, 32)
    for stage, (kernel, expansion, width, repeats) in PUBLISHED.items():
        blocks = {name.split("/")[2] for name in linen if name.startswith(f"params/{stage}/")}
        assert blocks == {f"block{i}" for i in range(1, repeats + 1)}
        for block in sorted(blocks):
            prefix, inner = f"params/{stage}/{block}", channels * expansion
            assert (f"{prefix}/expand/conv/kernel" in linen) == (expansion > 1)
            if expansion > 1:
                assert linen[f"{prefix}/expand/conv/kernel"].shape == (1, 1, channels, inner)
            assert linen[f"{prefix}/depthwise/conv/kernel"].shape == (kernel, kernel, 1, inner)
            assert linen[f"{prefix}/project/conv/kernel"].shape == (1, 1, inner, width)
            assert linen[f"batch_stats/{stage}/{block}/project/norm/var"].shape == (width,)
            channels = width
    assert linen["params/features/conv/kernel"].shape == (1, 1, 320, 1280)
    assert linen["params/head/kernel"].shape == (1280, 1000)
    assert linen["params/head/bias"].shape == (1000,)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("_bn0.weight", "params/stem/norm/scale"),
        ("_bn0.bias", "params/stem/norm/bias"),
        ("_bn0.running_mean", "batch_stats/stem/norm/mean"),
        ("_bn1.running_var", "batch_stats/features/norm/var"),
        ("_blocks.0._bn1.weight", "params/stage1/block1/depthwise/norm/scale"),
        ("_blocks.1._bn0.bias", "params/stage2/block1/expand/norm/bias"),
        ("_blocks.4._bn2.running_var", "batch_stats/stage3/block2/project/norm/var"),
        ("_blocks.7._bn1.running_mean", "batch_stats/stage4/block3/depthwise/norm/mean"),
        ("_blocks.14._bn2.weight", "params/stage6/block4/project/norm/scale"),
        ("_blocks.15._bn2.bias", "params/stage7/block1/project/norm/bias"),
        ("_fc.bias", "params/head/bias"),
    ],
)
def test_vectors_go_where_they_belong(source, linen, key, name):
    np.testing.assert_array_equal(linen[name], source[key])


def test_kernels_change_their_axes_and_nothing_else(source, linen):
    conv = (
        source["_blocks.10._expand_conv.weight"],
        linen["params/stage5/block3/expand/conv/kernel"],
    )
    assert conv[1][0, 0, 3, 7] == conv[0][7, 3, 0, 0]
    stem = source["_conv_stem.weight"], linen["params/stem/conv/kernel"]
    np.testing.assert_array_equal(stem[1], np.einsum("oihw->hwio", stem[0]))
    depth = (
        source["_blocks.0._depthwise_conv.weight"],
        linen["params/stage1/block1/depthwise/conv/kernel"],
    )
    np.testing.assert_array_equal(depth[1], np.einsum("cihw->hwic", depth[0]))
    np.testing.assert_array_equal(linen["params/head/kernel"], source["_fc.weight"].T)
    assert all(array.flags.c_contiguous for array in linen.values())


# ---- layouts -----------------------------------------------------------------------------------


def test_a_flattened_map_is_read_channels_first():
    # Torch flattens [c, h, w], Linen [h, w, c]: the same products, summed in another order.
    rng = np.random.default_rng(0)
    maps, weight = rng.standard_normal((5, 2, 3, 3)), rng.standard_normal((4, 18))
    kernel = flattened(2, 3).change(weight)
    assert kernel.shape == (18, 4)
    wanted = maps.reshape(5, 18) @ weight.T
    np.testing.assert_allclose(maps.transpose(0, 2, 3, 1).reshape(5, 18) @ kernel, wanted)


def test_a_flattened_map_of_another_size_is_left_for_the_merge_to_refuse():
    assert flattened(2, 3).change(np.zeros((4, 50))).shape == (50, 4)


def test_bgr_turns_the_input_channels_of_either_layout():
    blue, green, red = 1.0, 2.0, 3.0
    keras = np.broadcast_to(np.array([blue, green, red])[:, None], (1, 1, 3, 2))
    assert bgr(CONV_HWIO).change(keras)[0, 0, :, 1].tolist() == [red, green, blue]
    caffe = keras.transpose(3, 2, 0, 1)
    assert bgr(CONV_OIHW).change(caffe)[0, 0, :, 1].tolist() == [red, green, blue]
    assert (bgr(CONV_HWIO).axes, bgr(CONV_OIHW).axes) == ("HWIO", "OIHW")


# ---- choosing and refusing ---------------------------------------------------------------------

TORCH = Naming(
    "torch",
    inputs.IMAGENET,
    {"fc.weight": ("params/head/kernel", DENSE_OI), "fc.bias": ("params/head/bias", VECTOR)},
    frozenset({"steps"}),
    lambda key: key.removeprefix("net."),
)
KERAS = Naming("keras", inputs.CAFFE, {"fc/bias": ("params/head/bias", VECTOR)})


def test_the_naming_that_knows_most_is_chosen():
    assert choose_naming("net", (TORCH, KERAS), ["fc.weight", "steps"]) is TORCH
    assert choose_naming("net", (TORCH, KERAS), ["net.fc.bias"]) is TORCH
    assert choose_naming("net", (TORCH, KERAS), ["fc/bias"]) is KERAS


def test_ignored_keys_are_left_and_old_names_renamed():
    tensors = {
        "net.fc.weight": np.arange(6.0).reshape(2, 3),
        "fc.bias": np.ones(2),
        "steps": np.zeros(()),
    }
    linen = to_linen(TORCH, tensors)
    assert linen.keys() == {"params/head/kernel", "params/head/bias"}
    np.testing.assert_array_equal(linen["params/head/kernel"], [[0, 3], [1, 4], [2, 5]])


def test_two_keys_for_one_place():
    tensors = {"net.fc.bias": np.ones(2), "fc.bias": np.ones(2)}
    with pytest.raises(UserError, match=r"^two tensors for params/head/bias, the second is fc\.b"):
        to_linen(TORCH, tensors)


def test_unknown_keys_are_listed(source):
    keys = [*source, "_blocks.16._bn0.num_batches_tracked", "aux.weight"]
    with pytest.raises(UserError) as caught:
        choose_naming(MODEL, namings(MODEL), keys)
    message = str(caught.value)
    assert message.startswith(
        f"2 of {len(keys)} keys are unknown for efficientnet_lite0 (as written by "
        "efficientnet-lite-pytorch, timm): _blocks.16._bn0.num_batches_tracked, aux.weight;"
    )
    many = [f"layer{i}.weight" for i in range(9)]
    with pytest.raises(UserError, match=r"^9 of 9 keys .* layer0.*layer5\.weight and 3 more;"):
        choose_naming(MODEL, namings(MODEL), many)


def test_wrong_number_of_axes():
    with pytest.raises(UserError, match=r"^fc.weight has shape \[4\], expected 2 axes \(OI\)$"):
        to_linen(TORCH, {"fc.weight": np.ones(4, np.float32)})


def test_a_model_that_nobody_else_writes():
    with pytest.raises(UserError, match=r"'lenet5': it loads the weights\.safetensors of a run"):
        choose_naming("lenet5", namings("lenet5"), ["a"])
