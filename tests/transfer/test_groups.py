"""The table of groups: every stage exactly once, and what it drives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models.registry import list_models, model_spec
from medtl_jax.transfer import groups

STAGES = ("stem", "stage1", "stage2", "features", "head")


def patterns(frozen="", low="", high=""):
    return {"frozen": frozen, "low": low, "high": high}


def test_every_stage_gets_its_group():
    found = groups.assign_stages(STAGES, patterns("stem, stage[1]", "stage2,features", "head"))
    assert found == {
        "stem": "frozen",
        "stage1": "frozen",
        "stage2": "low",
        "features": "low",
        "head": "high",
    }
    assert list(found) == list(STAGES)
    assert groups.frozen_stages(found) == ("stem", "stage1")


def test_a_pattern_must_match_the_whole_name():
    # "stage1" is no part of "stage10", and two patterns of one group may overlap.
    table = groups.assign_stages(
        ("stage1", "stage10", "head"), patterns("stage1", "", "stage1.,stage10,head")
    )
    assert table == {"stage1": "frozen", "stage10": "high", "head": "high"}


def test_empty_groups_are_allowed():
    assert set(groups.assign_stages(STAGES, patterns(high=".*")).values()) == {"high"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            patterns("stem,stage3", "stage.,features", "head"),
            "transfer.groups.frozen: 'stage3' matches no stage of the model; "
            "its stages are stem, stage1, stage2, features, head",
        ),
        (
            patterns("stem", "(stage", "head"),
            "transfer.groups.low: '(stage' is no regular expression "
            "(missing ), unterminated subpattern at position 0)",
        ),
        (
            patterns("stem,stage1", "stage.,features", "features,head"),
            "transfer.groups: in two groups: stage1 (frozen and low), features (low and high); "
            "name each stage once",
        ),
        (
            patterns("stem", "features", "head"),
            "transfer.groups: in no group: stage1, stage2; add to frozen, low or high",
        ),
        (
            patterns(frozen=".*"),
            "transfer.groups: every stage is frozen; leave at least the head to train",
        ),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError) as caught:
        groups.assign_stages(STAGES, config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((), None),
        (("params/stage2/conv/kernel", "params/head/bias"), None),
        (
            ("params/stem/conv/kernel", "params/head/bias"),
            "stem keeps its own first values (model.dont_load) but is frozen: "
            "put it into low or high of transfer.groups",
        ),
        (
            ("batch_stats/stage1/norm/mean", "params/stem/conv/kernel", "params/stem/norm/bias"),
            "stem, stage1 keep their own first values (model.dont_load) but are frozen: "
            "put them into low or high of transfer.groups",
        ),
        (
            ("params/aux/kernel",),
            "aux keeps its own first values (model.keep_head) but is frozen: "
            "put it into low or high of transfer.groups",
        ),
    ],
)
def test_what_is_frozen_has_been_loaded(kept, message):
    stages = (*STAGES, "aux")
    table = groups.assign_stages(stages, patterns("stem,stage1,aux", "stage2,features", "head"))
    if message is None:
        assert groups.check_loaded(table, kept, ("aux", "head")) is None
        return
    with pytest.raises(UserError) as caught:
        groups.check_loaded(table, kept, ("aux", "head"))
    assert str(caught.value) == message


PARAMS = {"stem": {"conv": {"kernel": jnp.ones(3)}}, "head": {"bias": jnp.ones(2)}}
TABLE = {"stem": "frozen", "head": "low"}


@pytest.mark.parametrize(
    ("stages", "frozen", "low"),
    [
        (("stem", "stage1", "stage2", "features"), "stem,stage1", "stage2,features"),
        (("stem", "stage1", "features"), "stem", "stage1,features"),
        (
            ("stem", *(f"stage{i}" for i in range(1, 8)), "features"),
            "stem,stage1,stage2,stage3",
            "stage4,stage5,stage6,stage7,features",
        ),
    ],
)
def test_by_default_the_first_half_is_frozen(stages, frozen, low):
    assert groups.default_groups(stages, ("head",)) == patterns(frozen, low, "head")


@pytest.mark.parametrize("name", list_models())
def test_the_default_groups_cover_every_model(name):
    spec = model_spec(name)
    for heads in {(spec.head,), (*spec.auxiliary, spec.head)}:
        table = groups.assign_stages(
            (*spec.stages, *heads), groups.default_groups(spec.stages, heads)
        )
        assert table["stem"] == "frozen" and table[spec.stages[-1]] == "low"
        assert {table[head] for head in heads} == {"high"}


def test_label_tree_has_one_label_a_leaf():
    assert groups.label_tree(PARAMS, TABLE) == {
        "stem": {"conv": {"kernel": "frozen"}},
        "head": {"bias": "low"},
    }


def test_norms_of_every_domain_are_frozen_with_the_first():
    one = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    stage = {"conv": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "norm": {**one, "domain1": one}}
    params = {"stem": stage, "discriminator": {"logits": {"kernel": jnp.ones(3)}}}
    found = groups.label_tree(params, {"stem": "low", "discriminator": "discriminator"}, ["stem"])
    frozen = {"scale": "frozen", "bias": "frozen"}
    assert found == {
        "stem": {
            "conv": {"kernel": "low", "bias": "low"},
            "norm": {**frozen, "domain1": frozen},
        },
        "discriminator": {"logits": {"kernel": "discriminator"}},
    }


def test_label_tree_needs_every_stage():
    with pytest.raises(KeyError, match="head"):
        groups.label_tree(PARAMS, {"stem": "frozen"})


def test_stop_frozen_stops_the_gradient_of_frozen_leaves_alone():
    def loss(params):
        stopped = groups.stop_frozen(params, groups.label_tree(PARAMS, TABLE))
        return (3.0 * stopped["stem"]["conv"]["kernel"]).sum() + (
            2.0 * stopped["head"]["bias"]
        ).sum()

    gradient = jax.grad(loss)(PARAMS)
    np.testing.assert_array_equal(gradient["stem"]["conv"]["kernel"], [0, 0, 0])
    np.testing.assert_array_equal(gradient["head"]["bias"], [2, 2])
