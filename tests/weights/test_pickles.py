"""The interpreter of pickles: nothing runs, nothing explodes, each refusal has its reason."""

import os
import pickle
import struct

import pytest
from torch_bytes import (
    REBUILD,
    Call,
    Evil,
    Global,
    Storage,
    dumps,
    legacy,
    read,
    refusal,
    storage,
    system_calls,
    tensor,
)

from medtl_jax.weights import pickles


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
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 1000)
    state = {f"w{i}": tensor() for i in range(100)}
    assert "over 1,000 bytes" in refusal(tmp_path, legacy(state))


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep\ndown"), struct.error("x")])
def test_any_failure_of_the_decoder_is_one_line(tmp_path, monkeypatch, error):
    def fail(stream):
        raise error

    monkeypatch.setattr(pickles.pickletools, "genops", fail)
    assert f"damaged ({type(error).__name__}" in refusal(tmp_path, legacy({"w": tensor()}))
