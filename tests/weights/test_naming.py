"""The family tables: names against the published architecture, layouts against their axes."""

import re

import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.naming import FAMILIES, to_linen
from medtl_jax.weights.sources import find_weights

MODEL = "efficientnet_lite0"


@pytest.fixture(scope="module")
def source():
    return read_weights(find_weights(MODEL, "imagenet")).tensors


@pytest.fixture(scope="module")
def linen(source):
    return to_linen(MODEL, source)


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


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_tables_are_one_to_one(model):
    naming = FAMILIES[model]()
    names = [name for name, _ in naming.targets.values()]
    assert len(set(names)) == len(names)
    assert all(re.match("(params|batch_stats)/", name) for name in names)
    assert not naming.ignored & naming.targets.keys()


def test_unknown_keys_are_listed(source):
    extra = {
        **source,
        "_blocks.16._bn0.num_batches_tracked": np.zeros(()),
        "aux.weight": np.ones(3),
    }
    with pytest.raises(UserError) as caught:
        to_linen(MODEL, extra)
    message = str(caught.value)
    assert "2 unknown keys: _blocks.16._bn0.num_batches_tracked, aux.weight;" in message
    many = {f"layer{i}.weight": np.ones(3) for i in range(9)}
    with pytest.raises(UserError, match=r"9 unknown keys: layer0.*layer5.weight and 3 more;"):
        to_linen(MODEL, many)


def test_wrong_number_of_axes():
    with pytest.raises(UserError, match=r"_fc.weight has shape \[4\], expected 2 axes \(OI\)"):
        to_linen(MODEL, {"_fc.weight": np.ones(4, np.float32)})


def test_unknown_model():
    with pytest.raises(UserError, match="'lenet9'; known: efficientnet_lite0"):
        to_linen("lenet9", {})
