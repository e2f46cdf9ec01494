"""Runs of a study as members of one program: which may be, and that nothing else changes."""

import numpy as np
import pytest
from digit_runs import history, make_request, run, scores, write_digits

from medtl_jax import runs
from medtl_jax.ensemble.program import PROGRAMS
from medtl_jax.errors import UserError
from medtl_jax.process import sharing

pytestmark = pytest.mark.usefixtures("small_runs", "no_pictures")

# Of all settings in which members may differ, but those of augmentation; and of three of these.
VALUES = {
    "optim__low__lr": (1e-3, 3e-3),
    "optim__high__lr": (3e-3, 1e-3),
    "optim__low__weight_decay": (0.1, 0.01),
    "optim__high__weight_decay": (0.01, 0.1),
    "transfer__alpha": (0.01, 0.1),
    "transfer__beta": (1.0, 0.5),
    "train__label_smoothing": (0.05, 0.2),
    "augment__shift": (0.05, 0.2),
    "augment__rotate": (5.0, 20.0),
    "augment__brightness": (0.1, 0.3),
}
COMMON = {
    "optim__name": "sgd",
    "transfer__groups__frozen": "stem",
    "transfer__groups__low": "stage1,features",
    "transfer__groups__high": "head",
    "transfer__pretrain_loss": "l2sp",
    "train__epochs": 2,
    "train__devices": 1,
    "eval__drift": False,
}


@pytest.fixture(scope="module")
def first(five, tmp_path_factory):
    """A LeNet that has seen other pictures of these digits."""
    data = write_digits(tmp_path_factory.mktemp("other") / "digits.npz", 5, seed=3)
    return run(tmp_path_factory.mktemp("first") / "run", data, "none", train__epochs=1)


@pytest.fixture(scope="module")
def finetune(small_runs):
    from experiments import finetune

    return finetune


@pytest.fixture
def calls(finetune, monkeypatch):
    """How many runs each program had."""
    found, together = [], finetune.fit_members
    monkeypatch.setattr(
        finetune,
        "fit_members",
        lambda trainings, *others: found.append(len(trainings)) or together(trainings, *others),
    )
    return found


def both(tmp_path, name, five, first, **keys):
    return [
        make_request(
            tmp_path / f"{name}{place}",
            five,
            first,
            seed=place,
            **COMMON,
            **{key: values[place] for key, values in VALUES.items()},
            **keys,
        )
        for place in range(2)
    ]


@pytest.mark.parametrize("program", ["turns", "vmap"])
def test_members_with_values_of_their_own_end_as_each_does_alone(
    finetune, five, first, tmp_path, calls, program
):
    finetune.run_all(both(tmp_path, "alone", five, first, train__program="alone"))
    assert calls == []
    finetune.run_all(both(tmp_path, "member", five, first, train__program=program))
    assert calls == [2]
    for place in range(2):
        alone, member = tmp_path / f"alone{place}", tmp_path / f"member{place}"
        for ours, theirs in zip(history(member), history(alone), strict=True):
            ours, theirs = (
                {key: value for key, value in record.items() if not key.endswith("_bytes")}
                for record in (ours, theirs)
            )
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(scores(member), scores(alone), rtol=1e-3, atol=1e-5)
    assert not np.allclose(scores(tmp_path / "member0"), scores(tmp_path / "member1"), rtol=1e-2)


APART = {
    "another optimizer": {"optim__name": "adamw"},
    "a loss that is off": {"transfer__alpha": 0.0, "transfer__pretrain_loss": "none"},
    "a transform that is off": {"augment__shift": 0.0},
    "another length": {"train__epochs": 3},
    "by themselves": {"train__program": "alone"},
}


@pytest.mark.parametrize("keys", APART.values(), ids=APART)
def test_runs_that_differ_by_more_are_programs_of_their_own(
    finetune, five, first, tmp_path, monkeypatch, keys
):
    asked = []
    monkeypatch.setattr(finetune, "_train", lambda members: asked.append(len(members)) or [[]])
    monkeypatch.setattr(finetune, "_report", lambda *args: None)
    usual = {"transfer__alpha": 0.1, "augment__shift": 0.1, "train__program": "turns", **COMMON}
    finetune.run_all(
        [
            make_request(tmp_path / "one", five, first, **usual),
            make_request(tmp_path / "two", five, first, **{**usual, **keys}),
        ]
    )
    assert asked == [1, 1]


def test_convolutions_on_one_device_of_a_cpu_train_by_themselves_unless_asked(
    five, first, tmp_path
):
    from experiments import packing

    def shares(**keys):
        request = make_request(tmp_path / "run", five, first, **{"train__devices": 1, **keys})
        return packing.may_share(request.config)

    own = {"transfer__alpha": 0.1, "transfer__pretrain_loss": "l2sp"}
    assert not shares(**own)
    assert shares(**own, train__devices=4)
    assert all(shares(**own, train__program=name) for name in PROGRAMS)
    assert shares(**own, train__program="fastest")
    assert shares(transfer__strategy="head")
    # What DELTA weighs the maps with is worked out by each run.
    assert not shares(**own | {"transfer__pretrain_loss": "delta"}, train__program="vmap")


def test_a_study_takes_its_runs_in_packs_that_leave_some_to_others(
    five, first, tmp_path, monkeypatch
):
    from experiments import packing

    monkeypatch.setattr(packing, "MOST", 8)

    def config(seed, **keys):
        given = {"transfer__strategy": "head", "train__epochs": 1, **keys}
        return make_request(tmp_path / "run", five, first, seed=seed, **given).config

    rates = [config(seed, optim__high__lr=rate) for seed in range(3) for rate in (1e-3, 2e-3, 3e-3)]
    other = config(0, optim__name="sgd")
    alone = config(0, train__program="alone")
    found = packing.packs([other, *rates, alone])
    assert [len(pack) for pack in found] == [1, packing.MOST, 1, 1]
    assert sorted(place for pack in found for place in pack) == list(range(11))
    # Of eleven that two processes are to make, one takes six at most.
    monkeypatch.setattr(packing, "MOST", 16)
    with sharing(2):
        assert [len(pack) for pack in packing.packs([other, *rates, alone])] == [1, 6, 3, 1]
        assert [len(pack) for pack in packing.packs(rates[:1])] == [1]


def test_a_run_goes_on_in_another_program(five, first, tmp_path):
    def config(**keys):
        return make_request(tmp_path / "run", five, first, **COMMON, **keys).config

    folder = tmp_path / "run"
    runs.open_folder(folder, config(train__program="alone"), {})
    runs.check_folder(folder, config(train__program="vmap"))
    with pytest.raises(UserError, match=r"another config: train\.remat"):
        runs.check_folder(folder, config(train__program="vmap", train__remat=True))
