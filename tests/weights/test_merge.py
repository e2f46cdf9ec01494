"""The strict merge, on toy trees with every kind of mistake. Files are in test_pretrained.py."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec
from medtl_jax.weights.merge import MergeReport, merge_weights


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


AUX = {"params/aux/kernel": np.ones((4, 2), np.float32), "params/aux/bias": np.ones(2, np.float32)}


def with_aux():
    model = toy_model()
    model["params"]["aux"] = {
        "kernel": np.zeros((4, 2), np.float32),
        "bias": np.zeros(2, np.float32),
    }
    return model


def test_an_optional_part_that_only_the_file_has():
    merged, report = merge_weights(toy_model(), toy_file() | AUX, optional=("aux", "aux2"))
    assert report.skipped == {"params/aux/kernel": (4, 2), "params/aux/bias": (2,)}
    assert not report.kept and set(report.loaded) == set(toy_file())
    assert "aux" not in merged["params"]


def test_an_optional_part_that_only_the_model_has():
    model = with_aux()
    merged, report = merge_weights(model, toy_file(), optional=("aux",))
    assert set(report.kept) == set(AUX)
    assert merged["params"]["aux"]["kernel"] is model["params"]["aux"]["kernel"]


def test_an_optional_part_that_both_have_is_loaded():
    merged, report = merge_weights(with_aux(), toy_file() | AUX, optional=("aux",))
    assert not report.kept and not report.skipped
    np.testing.assert_array_equal(merged["params"]["aux"]["kernel"], AUX["params/aux/kernel"])


def test_half_an_optional_part_is_no_part():
    half = {"params/aux/bias": AUX["params/aux/bias"]}
    text = message(with_aux(), toy_file() | half, optional=("aux",))
    assert "1 missing from the file (params/aux/kernel [4, 2])" in text
    long = {"params/auxiliary/bias": np.ones(2, np.float32)}
    text = message(toy_model(), toy_file() | long, optional=("aux",))
    assert "1 not in the model (params/auxiliary/bias [2])" in text


def test_report_is_a_few_readable_lines():
    report = MergeReport(
        loaded={"params/stem/conv/kernel": (3, 3, 3, 32), "params/stem/norm/bias": (32,)},
        kept={"params/head/bias": (4,), "params/head/kernel": (1280, 4)},
        skipped={"params/head/bias": (1000,), "params/head/kernel": (1280, 1000)},
        source="net.pth",
        sha256="0123456789abcdef" * 4,
        scheme="timm",
        input=InputSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        input_origin="names of timm",
        adapted=("params/stem/conv/kernel from 3 to 1 channels",),
    )
    assert str(report).splitlines() == [
        "loaded 896 values in 2 tensors from net.pth (sha256 01234567..., names of timm)",
        "input: (x - mean) / std, x in 0..255, mean 123.675 116.28 103.53, std 58.395 57.12 57.375"
        ", names of timm",
        "adapted: params/stem/conv/kernel from 3 to 1 channels",
        "kept own init (5,124 values): params/head/bias [4], params/head/kernel [1280, 4]",
        "not taken from the file: params/head/bias [1000], params/head/kernel [1280, 1000]",
    ]
    many = MergeReport(loaded={"a": ()}, kept={f"k{i}": (2,) for i in range(10)}, skipped={})
    assert str(many).splitlines()[0] == "loaded 1 values in 1 tensors"
    assert str(many).endswith("k7 [2] and 2 more")
    equal = InputSpec((127.5,) * 500, (128.0,) * 500)
    report = MergeReport(loaded={"a": ()}, kept={}, skipped={}, input=equal)
    assert str(report).endswith("input: (x - mean) / std, x in 0..255, mean 127.5, std 128")
    differing = InputSpec(tuple(range(500)), (255 / 3,) * 500)
    report = MergeReport(loaded={"a": ()}, kept={}, skipped={}, input=differing)
    assert str(report).endswith("mean 0 1 2 3 ..., std 85")


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
