"""The strict merge: on toy trees with every kind of mistake, and once on the real weights."""

import math

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.merge import MergeReport, load_pretrained, merge_weights
from medtl_jax.weights.naming import to_linen
from medtl_jax.weights.sources import find_weights

REAL = "efficientnet_lite0"


def toy_model(classes=2):
    return {
        "params": {
            "stem": {"kernel": np.zeros((3, 4), np.float32), "scale": np.zeros(4, np.float32)},
            "head": {
                "kernel": np.full((4, classes), 0.5, np.float32),
                "bias": np.full(classes, 0.5, np.float32),
            },
        },
        "batch_stats": {"stem": {"mean": np.zeros(4, np.float32)}},
    }


def toy_file(classes=2):
    return {
        "params/stem/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
        "params/stem/scale": np.arange(4, dtype=np.float32),
        "params/head/kernel": np.ones((4, classes), np.float32),
        "params/head/bias": np.full(classes, 7, np.float32),
        "batch_stats/stem/mean": np.full(4, -1, np.float32),
    }


def message(model, loaded, **kwargs):
    with pytest.raises(UserError) as caught:
        merge_weights(model, loaded, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_leaf_is_replaced_and_the_tree_stays():
    model, loaded = toy_model(), toy_file()
    merged, report = merge_weights(model, loaded)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_array_equal(merged["params"]["stem"]["kernel"], loaded["params/stem/kernel"])
    np.testing.assert_array_equal(merged["params"]["stem"]["scale"], [0, 1, 2, 3])
    np.testing.assert_array_equal(merged["params"]["head"]["kernel"], np.ones((4, 2)))
    np.testing.assert_array_equal(merged["params"]["head"]["bias"], [7, 7])
    np.testing.assert_array_equal(merged["batch_stats"]["stem"]["mean"], [-1] * 4)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    assert set(report.loaded) == set(loaded)
    assert not report.kept and not report.skipped
    assert report.loaded_values == 12 + 4 + 8 + 2 + 4
    assert not np.any(model["params"]["stem"]["kernel"])


def test_merged_leaves_do_not_share_memory_with_the_file():
    loaded = toy_file()
    merged, _ = merge_weights(toy_model(), loaded)
    loaded["params/stem/kernel"][:] = -9
    assert merged["params"]["stem"]["kernel"][2, 3] == 11


def test_dont_load_keeps_the_models_own_head():
    model = toy_model(classes=3)
    merged, report = merge_weights(model, toy_file(), dont_load=("params/head/.*",))
    assert merged["params"]["head"]["kernel"] is model["params"]["head"]["kernel"]
    assert merged["params"]["head"]["bias"] is model["params"]["head"]["bias"]
    assert merged["params"]["stem"]["kernel"][0, 1] == 1
    assert report.kept == {"params/head/bias": (3,), "params/head/kernel": (4, 3)}
    assert report.skipped == {"params/head/bias": (2,), "params/head/kernel": (4, 2)}
    assert (report.loaded_values, report.kept_values) == (20, 15)


def test_dont_load_excuses_missing_extra_and_bad_names():
    loaded = toy_file()
    loaded["params/aux/bias"] = loaded.pop("params/head/bias")
    loaded["params/head/kernel"][0, 0] = np.nan
    patterns = ["params/head/bias", "params/aux/.*", r"params/head/k\w+"]
    _, report = merge_weights(toy_model(), loaded, dont_load=patterns)
    assert set(report.kept) == {"params/head/bias", "params/head/kernel"}
    assert set(report.skipped) == {"params/aux/bias", "params/head/kernel"}


def test_missing_and_extra_are_listed_together():
    loaded = toy_file()
    loaded["params/neck/bias"] = loaded.pop("params/head/bias")
    text = message(toy_model(), loaded)
    assert "1 missing from the file (params/head/bias [2])" in text
    assert "1 not in the model (params/neck/bias [2])" in text
    assert "dont_load" in text


def test_long_lists_give_the_count_and_the_first_few():
    loaded = toy_file() | {f"params/x{i}": np.ones(1, np.float32) for i in range(30)}
    text = message(toy_model(), loaded)
    assert (
        "30 not in the model (params/x0 [1]; params/x1 [1]; params/x2 [1]; params/x3 [1], ...)"
        in text
    )
    assert "missing" not in text


def test_shape_mismatch_is_never_broadcast_or_transposed():
    text = message(toy_model(), toy_file() | {"params/stem/kernel": np.ones((4, 3), np.float32)})
    assert "1 of another shape (params/stem/kernel: file [4, 3], model [3, 4])" in text
    text = message(toy_model(), toy_file() | {"params/stem/scale": np.ones((1,), np.float32)})
    assert "params/stem/scale: file [1], model [4]" in text


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_dtype_kind_mismatch(dtype):
    text = message(toy_model(), toy_file() | {"params/stem/scale": np.ones(4, dtype)})
    assert f"1 of another dtype (params/stem/scale: file {np.dtype(dtype)}, model float32)" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    loaded = toy_file()
    loaded["batch_stats/stem/mean"][2] = value
    assert "1 with NaN or infinite values (batch_stats/stem/mean)" in message(toy_model(), loaded)


def test_floats_take_the_models_dtype_if_they_fit():
    loaded = toy_file() | {"params/stem/scale": np.array([0.1, 1, 2, 3], np.float64)}
    loaded["params/head/bias"] = np.array([0.5, 65504], np.float16)
    merged, _ = merge_weights(toy_model(), loaded)
    assert merged["params"]["stem"]["scale"].dtype == jnp.float32
    assert merged["params"]["stem"]["scale"][0] == np.float32(0.1)
    np.testing.assert_array_equal(merged["params"]["head"]["bias"], [0.5, 65504])
    loaded["params/stem/scale"][0] = 1e39
    assert "1 with values outside the model's dtype (params/stem/scale" in message(
        toy_model(), loaded
    )


def test_integers_must_survive():
    model = {"params": {"count": np.zeros(2, np.int32)}}
    merged, _ = merge_weights(model, {"params/count": np.array([3, -4], np.int64)})
    assert merged["params"]["count"].tolist() == [3, -4]
    assert merged["params"]["count"].dtype == jnp.int32
    assert "outside" in message(model, {"params/count": np.array([3, 2**31], np.int64)})
    wide = {"params": {"count": np.zeros(2, np.int64)}}
    assert "outside" in message(wide, {"params/count": np.array([3, 2**31], np.int64)})


@pytest.mark.parametrize(
    ("dont_load", "reason"),
    [
        (("params/haed/.*",), "'params/haed/.*' matches no name of the model or the file"),
        (("head/.*",), "'head/.*' matches no name"),
        (("params/head/.*", "params/head/kern"), "'params/head/kern' matches no name"),
        (("params/(head",), "is no regular expression"),
        ("params/head/.*", "must be a list of patterns"),
        ((".*",), "leaves nothing to load"),
    ],
)
def test_mistakes_in_dont_load(dont_load, reason):
    assert reason in message(toy_model(), toy_file(), dont_load=dont_load)


def test_report_is_a_few_readable_lines():
    report = MergeReport(
        loaded={"params/stem/conv/kernel": (3, 3, 3, 32), "params/stem/norm/bias": (32,)},
        kept={"params/head/bias": (4,), "params/head/kernel": (1280, 4)},
        skipped={"params/head/bias": (1000,), "params/head/kernel": (1280, 1000)},
        source="net.pth",
        sha256="0123456789abcdef" * 4,
    )
    assert str(report).splitlines() == [
        "loaded 896 values in 2 tensors from net.pth (sha256 01234567...)",
        "kept own init (5,124 values): params/head/bias [4], params/head/kernel [1280, 4]",
        "not taken from the file: params/head/bias [1000], params/head/kernel [1280, 1000]",
    ]
    many = MergeReport(loaded={"a": ()}, kept={f"k{i}": (2,) for i in range(10)}, skipped={})
    assert str(many).splitlines()[0] == "loaded 1 values in 1 tensors"
    assert str(many).endswith("k7 [2] and 2 more")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(3, name="dense")(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_variables_of_linen(frozen):
    variables = Net().init(jax.random.key(0), jnp.ones((1, 2)))
    variables = flax.core.freeze(variables) if frozen else variables
    loaded = {
        "params/dense/kernel": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
        "params/dense/bias": np.zeros(3, np.float32),
        "params/norm/scale": np.full(3, 2, np.float32),
        "params/norm/bias": np.full(3, 10, np.float32),
        "batch_stats/norm/mean": np.array([5, 7, 9], np.float32),
        "batch_stats/norm/var": np.full(3, 4 - 1e-5, np.float32),
    }
    merged, _ = merge_weights(variables, loaded)
    assert type(merged) is type(variables)
    # [1, 1] @ kernel = [5, 7, 9] = the mean; [2, 1] adds [1, 2, 3] * 2 / sqrt(4).
    out = Net().apply(merged, jnp.array([[1.0, 1.0], [2.0, 1.0]]))
    np.testing.assert_allclose(out, [[10, 10, 10], [11, 12, 13]], rtol=1e-6)


def nested(flat, classes):
    """The variables of a model with `classes`, as shapes, that `flat` was made from."""
    tree: dict = {}
    for name, array in flat.items():
        shape = (*array.shape[:-1], classes) if name.startswith("params/head") else array.shape
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def test_load_pretrained_on_the_real_file():
    path = find_weights(REAL, "imagenet")
    file = read_weights(path)
    shapes = nested(to_linen(REAL, file.tensors), classes=4)
    merged, report, sha256 = load_pretrained(shapes, REAL, "imagenet", ("params/head/.*",))
    assert sha256 == file.sha256 == report.sha256
    # 4,652,008 - 1,281,000 of the head + 42,016 running statistics.
    assert report.loaded_values == 3_413_024
    assert len(report.loaded) == 245
    assert str(report).startswith(
        "loaded 3,413,024 values in 245 tensors from efficientnet-lite0-57934424.pth "
        "(sha256 57934424...)\n"
    )
    assert merged["params"]["head"]["kernel"] == jax.ShapeDtypeStruct((1280, 4), jnp.float32)
    kernel = merged["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 1, 2], file.tensors["_conv_stem.weight"][:, 2, 0, 1])
    trunk = [leaf for leaf in jax.tree.leaves(merged) if isinstance(leaf, jax.Array)]
    assert sum(math.prod(leaf.shape) for leaf in trunk) == 3_413_024


def test_load_pretrained_names_the_file_in_its_refusals():
    path = find_weights(REAL, "imagenet")
    shapes = nested(to_linen(REAL, read_weights(path).tensors), classes=4)
    with pytest.raises(UserError) as caught:
        load_pretrained(shapes, REAL, str(path))
    assert str(caught.value).startswith(
        f"weights file {path}: the weights do not fit the model: 2 of"
    )
    with pytest.raises(UserError, match=r"weights file .*: no weight names are known"):
        load_pretrained(shapes, "lenet5", str(path))
