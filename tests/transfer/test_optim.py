"""Updates of each group computed by hand, and the learning rates of known steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.transfer import optim

pytestmark = pytest.mark.usefixtures("optax_promotion")

LABELS = {"stem": {"w": "frozen"}, "body": {"w": "low", "b": "low"}, "head": {"w": "high"}}
PARAMS = {
    "stem": {"w": jnp.array([[5.0, -5.0]])},
    "body": {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array([3.0])},
    "head": {"w": jnp.array([[2.0], [0.5]])},
}
GRADIENTS = (
    {
        "stem": {"w": jnp.array([[9.0, 9.0]])},
        "body": {"w": jnp.array([[0.3, -0.4]]), "b": jnp.array([0.2])},
        "head": {"w": jnp.array([[-1.0], [2.0]])},
    },
    {
        "stem": {"w": jnp.array([[1.0, 7.0]])},
        "body": {"w": jnp.array([[-0.1, 0.5]]), "b": jnp.array([0.4])},
        "head": {"w": jnp.array([[0.5], [1.0]])},
    },
)
RATE = {"low": 0.01, "high": 0.1}
DECAY = {"low": 0.5, "high": 0.25}


def settings(name, clip=0.0, momentum=0.9):
    groups = {group: {"weight_decay": DECAY[group], "clip": clip} for group in RATE}
    return {"name": name, "momentum": momentum, **groups}


def constant(rate):
    return lambda step: jnp.float32(rate)


def updates_of(config, gradients=GRADIENTS, labels=LABELS, **options):
    """The updates of each gradient in turn; the parameters are held where they are."""
    schedules = {group: constant(rate) for group, rate in RATE.items()}
    optimizer = optim.make_optimizer(config, labels, schedules, **options)
    state, found = optimizer.init(PARAMS), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, PARAMS)
        found.append(updates)
    return found


def leaves():
    """(stage, leaf, learning rate, weight decay) of the trainable leaves: none on vectors."""
    return [
        ("body", "w", RATE["low"], DECAY["low"]),
        ("body", "b", RATE["low"], 0.0),
        ("head", "w", RATE["high"], DECAY["high"]),
    ]


def arrays(stage, leaf):
    first, second = (np.asarray(g[stage][leaf], np.float64) for g in GRADIENTS)
    return np.asarray(PARAMS[stage][leaf], np.float64), first, second


def check(found, stage, leaf, expected):
    for updates, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            updates[stage][leaf], wanted, rtol=3e-5, err_msg=f"{stage}/{leaf}"
        )


def test_sgd_by_hand():
    found = updates_of(settings("sgd"))
    for stage, leaf, rate, decay in leaves():
        p, g1, g2 = arrays(stage, leaf)
        first = g1 + decay * p
        check(found, stage, leaf, (-rate * first, -rate * (0.9 * first + g2 + decay * p)))
    # In numbers: 0.3 + 0.5 * 1 = 0.8, times -0.01.
    np.testing.assert_allclose(found[0]["body"]["w"][0, 0], -0.008, rtol=1e-6)


def test_adamw_by_hand():
    found = updates_of(settings("adamw"))
    for stage, leaf, rate, decay in leaves():
        p, g1, g2 = arrays(stage, leaf)
        mean = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
        square = (0.999 * 0.001 * g1**2 + 0.001 * g2**2) / (1 - 0.999**2)
        first = -rate * (np.sign(g1) + decay * p)  # g / |g|: the bias corrections cancel
        second = -rate * (mean / (np.sqrt(square) + 1e-8) + decay * p)
        check(found, stage, leaf, (first, second))


def test_rmsprop_by_hand():
    found = updates_of(settings("rmsprop", momentum=0.5))
    for stage, leaf, rate, decay in leaves():
        p, g1, g2 = arrays(stage, leaf)
        d1, d2 = g1 + decay * p, g2 + decay * p
        square1 = 0.1 * d1**2
        square2 = 0.9 * square1 + 0.1 * d2**2
        step1 = d1 / np.sqrt(square1 + 1e-3)  # TensorFlow's form: eps under the root
        step2 = 0.5 * step1 + d2 / np.sqrt(square2 + 1e-3)
        check(found, stage, leaf, (-rate * step1, -rate * step2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_a_frozen_leaf_gets_exactly_nothing(name):
    for updates in updates_of(settings(name, clip=1.0)):
        assert np.asarray(updates["stem"]["w"]).tobytes() == np.zeros((1, 2), np.float32).tobytes()


def test_no_memory_is_spent_on_frozen_leaves():
    optimizer = optim.make_optimizer(
        settings("adamw"), LABELS, {group: constant(rate) for group, rate in RATE.items()}
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(optimizer.init(PARAMS)) if leaf.ndim]
    trainable = [PARAMS[stage][leaf].shape for stage, leaf, _, _ in leaves()]
    assert sorted(shapes) == sorted(2 * trainable)


def scaled(stage, factor):
    tree = dict(GRADIENTS[0])
    tree[stage] = jax.tree.map(lambda leaf: leaf * factor, tree[stage])
    return tree


@pytest.mark.parametrize("stage", ["body", "stem"])
def test_clipping_of_one_group_leaves_the_others_alone(stage):
    config = settings("sgd", clip=1.0, momentum=0.0)
    usual = updates_of(config, [GRADIENTS[0]])[0]
    huge = updates_of(config, [scaled(stage, 1e6)])[0]
    np.testing.assert_array_equal(huge["head"]["w"], usual["head"]["w"])


def test_clipping_is_by_the_norm_of_the_group():
    # The head's gradient (-1, 2) has norm sqrt(5): clipped to 1, then decay 0.25 * (2, 0.5).
    found = updates_of(settings("sgd", clip=1.0, momentum=0.0), [GRADIENTS[0]])[0]
    wanted = -0.1 * (np.array([[-1.0], [2.0]]) / np.sqrt(5) + [[0.5], [0.125]])
    np.testing.assert_allclose(found["head"]["w"], wanted, rtol=1e-6)
    # The body's (0.3, -0.4, 0.2) has norm sqrt(0.29) < 1 and stays: its vector is not decayed.
    np.testing.assert_allclose(found["body"]["b"], [-0.01 * 0.2], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_a_frozen_leaf_of_a_stage_that_trains_gets_nothing_and_counts_for_nothing(name):
    config = settings(name, clip=0.4)
    found = updates_of(config, labels={**LABELS, "body": {"w": "low", "b": "frozen"}})
    without = [{**g, "body": {"w": g["body"]["w"], "b": jnp.zeros(1)}} for g in GRADIENTS]
    wanted = updates_of(config, without)
    for updates, reference in zip(found, wanted, strict=True):
        assert np.asarray(updates["body"]["b"]).tobytes() == np.zeros(1, np.float32).tobytes()
        np.testing.assert_array_equal(updates["body"]["w"], reference["body"]["w"])
        assert np.any(np.asarray(updates["body"]["w"]))


ONE_GROUP = {"stem": {"w": "frozen"}, "body": {"w": "high", "b": "high"}, "head": {"w": "high"}}


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_no_gradient_of_the_pretrained_stages_changes_the_new_ones(name):
    config = settings(name, clip=1.0)
    usual = updates_of(config, labels=ONE_GROUP, new=("head",))
    huge = [{**g, "body": jax.tree.map(lambda leaf: leaf * 1e4, g["body"])} for g in GRADIENTS]
    found = updates_of(config, huge, labels=ONE_GROUP, new=("head",))
    mixed = updates_of(config, huge, labels=ONE_GROUP)
    for updates, wanted, together in zip(found, usual, mixed, strict=True):
        np.testing.assert_array_equal(updates["head"]["w"], wanted["head"]["w"])
        assert not np.allclose(together["head"]["w"], wanted["head"]["w"])


def test_new_and_pretrained_stages_of_a_group_are_clipped_apart_by_hand():
    config = {**settings("sgd", clip=0.25, momentum=0.0), "high": {"weight_decay": 0, "clip": 0.25}}
    found = updates_of(config, [GRADIENTS[0]], labels=ONE_GROUP, new=("head",))[0]
    # Norms sqrt(0.29) of the body and sqrt(5) of the head, each clipped to 1/4; the rate is 0.1.
    body, head = -0.025 / np.sqrt(0.29), -0.025 / np.sqrt(5)
    np.testing.assert_allclose(found["body"]["w"], body * np.array([[0.3, -0.4]]), rtol=1e-6)
    np.testing.assert_allclose(found["body"]["b"], [body * 0.2], rtol=1e-6)
    np.testing.assert_allclose(found["head"]["w"], head * np.array([[-1.0], [2.0]]), rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_layer_decay_multiplies_a_stages_rate_and_weight_decay(name):
    config = settings(name)
    plain = updates_of(config)
    found = updates_of(config, scales={"body": 0.25, "head": 1.0})
    for updates, reference in zip(found, plain, strict=True):
        for leaf in ("w", "b"):
            # Exactly: to multiply by a power of two rounds nothing.
            quarter = 0.25 * np.asarray(reference["body"][leaf])
            np.testing.assert_array_equal(updates["body"][leaf], quarter)
        np.testing.assert_array_equal(updates["head"]["w"], reference["head"]["w"])
        np.testing.assert_array_equal(updates["stem"]["w"], reference["stem"]["w"])


def test_layer_decay_by_hand():
    found = updates_of(settings("sgd", momentum=0.0), scales={"body": 0.7})[0]
    # -rate * scale * (gradient + decay * weight), in the group low.
    wanted = -0.01 * 0.7 * (np.array([[0.3, -0.4]]) + 0.5 * np.array([[1.0, -2.0]]))
    np.testing.assert_allclose(found["body"]["w"], wanted, rtol=1e-6)


def structure(**options):
    schedules = {group: constant(rate) for group, rate in RATE.items()}
    optimizer = optim.make_optimizer(settings("adamw", clip=1.0), LABELS, schedules, **options)
    return jax.tree.structure(optimizer.init(PARAMS))


@pytest.mark.parametrize("options", [{"scales": {"body": 1.0, "head": 1.0}}, {"new": ("head",)}])
def test_what_is_off_or_of_one_kind_changes_nothing(options):
    config = settings("adamw", clip=1.0)
    found, plain = updates_of(config, **options), updates_of(config)
    for updates, reference in zip(found, plain, strict=True):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, updates, reference)))
    assert structure(**options) == structure()


def test_the_factors_of_layer_decay():
    table = {"stem": "frozen", "stage1": "low", "stage2": "high", "source_head": "low"}
    table |= {"aux": "high", "head": "high"}
    assert optim.layer_scales(("stem", "stage1", "stage2"), table, 0.5) == {
        "stage1": 0.25,
        "stage2": 0.5,
        "source_head": 0.5,
        "aux": 1.0,
        "head": 1.0,
    }
    thawed = optim.layer_scales(("stem", "stage1", "stage2"), {**table, "stem": "low"}, 0.5)
    assert thawed["stem"] == 0.125
    assert set(optim.layer_scales(("stem", "stage1", "stage2"), table, 1.0).values()) == {1.0}


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_layer_decay_is_refused(decay):
    with pytest.raises(UserError, match=r"transfer.layer_decay=.* must be more than 0 and at most"):
        optim.layer_scales(("stem",), {"stem": "low"}, decay)


def test_an_unknown_optimizer_is_one_line():
    with pytest.raises(UserError, match=r"optim.name='lamb' is not known; choose from adamw, rms"):
        updates_of(settings("lamb"))


def rates(schedule, steps):
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_warmup_then_cosine_at_known_steps():
    schedule = optim.warmup_cosine(2.0, 10, 4, 0.1)
    # Linear from 2 / 4; then half a cosine over the 6 steps to 0.2, with the middle at 1.1.
    quarter = 0.2 + 1.8 * (1 + np.cos(np.pi / 6)) / 2
    np.testing.assert_allclose(
        rates(schedule, (0, 1, 2, 4, 5, 7, 10, 99)),
        [0.5, 0.875, 1.25, 2.0, quarter, 1.1, 0.2, 0.2],
        rtol=1e-6,
    )


def test_cosine_without_warmup_at_known_steps():
    schedule = optim.warmup_cosine(2.0, 8, 0, 0.0)
    np.testing.assert_allclose(rates(schedule, (0, 4, 8)), [2.0, 1.0, 0.0], atol=1e-7)


def schedule_config(warmup=0.5, final=0.0, low=0.1, high=1.0):
    return {
        "warmup_epochs": warmup,
        "final_fraction": final,
        "low": {"lr": low},
        "high": {"lr": high},
    }


def test_schedules_are_made_for_the_groups_in_use():
    found = optim.make_schedules(schedule_config(), {"frozen", "high"}, 20, 10)
    assert set(found) == {"high"}
    # Half an epoch of ten steps: the first of 5 steps has a fifth of the peak.
    np.testing.assert_allclose(rates(found["high"], (0, 5, 20)), [0.2, 1.0, 0.0], atol=1e-7)
    both = optim.make_schedules(schedule_config(), {"low", "high"}, 20, 10)
    np.testing.assert_allclose(rates(both["low"], (5,)), [0.1], rtol=1e-6)


def test_an_optimizer_of_a_later_phase_goes_on_in_the_schedule():
    schedules = {group: lambda step: 1.0 / (1 + step) for group in RATE}
    for first, wanted in ((0, (1.0, 0.5)), (3, (0.25, 0.2))):
        config = settings("sgd", momentum=0.0)
        optimizer = optim.make_optimizer(config, LABELS, schedules, first_step=first)
        state = optimizer.init(PARAMS)
        for rate in wanted:
            updates, state = optimizer.update(GRADIENTS[0], state, PARAMS)
            np.testing.assert_allclose(updates["body"]["b"], [-rate * 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (schedule_config(warmup=2.0), r"optim.warmup_epochs=2.0 must be at least 0 and shorter"),
        (schedule_config(warmup=-1.0), r"optim.warmup_epochs=-1.0 must be"),
        (schedule_config(final=1.5), r"optim.final_fraction=1.5 must lie in 0..1"),
        (schedule_config(high=0.0), r"optim.high.lr=0.0 must be positive; to freeze, use the"),
        (schedule_config(low=float("nan")), r"optim.low.lr=nan must be positive"),
    ],
)
def test_impossible_schedules_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        optim.make_schedules(config, {"low", "high"}, 20, 10)


def test_a_discriminator_has_a_rate_a_decay_and_a_norm_of_its_own():
    config = {**settings("sgd", momentum=0.0), "discriminator": {"weight_decay": 0.5, "clip": 1.0}}
    labels = {"head": {"w": "high"}, "discriminator": {"w": "discriminator"}}
    params = {"head": {"w": jnp.array([2.0])}, "discriminator": {"w": jnp.array([[4.0, 0.0]])}}
    gradients = {"head": {"w": jnp.array([1.0])}, "discriminator": {"w": jnp.array([[3.0, 4.0]])}}
    schedules = {"high": constant(0.1), "discriminator": constant(0.01)}
    optimizer = optim.make_optimizer(config, labels, schedules)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # Clipped to (0.6, 0.8); then half of the weights is added.
    wanted = [[-0.01 * (0.6 + 2.0), -0.01 * 0.8]]
    np.testing.assert_allclose(updates["discriminator"]["w"], wanted, rtol=1e-6)
    alone = {"head": params["head"]}
    optimizer = optim.make_optimizer(config, {"head": labels["head"]}, {"high": constant(0.1)})
    without, _ = optimizer.update({"head": gradients["head"]}, optimizer.init(alone), alone)
    np.testing.assert_array_equal(updates["head"]["w"], without["head"]["w"])
    found = optim.group_norms(gradients, labels)
    assert set(found) == {"high", "discriminator"}
    np.testing.assert_allclose(found["discriminator"], 5.0, rtol=1e-6)


def test_group_norms_by_hand():
    found = optim.group_norms(GRADIENTS[0], LABELS)
    assert set(found) == {"low", "high"}
    np.testing.assert_allclose(found["low"], np.sqrt(0.09 + 0.16 + 0.04), rtol=1e-6)
    np.testing.assert_allclose(found["high"], np.sqrt(5.0), rtol=1e-6)
    without_bias = {**LABELS, "body": {"w": "low", "b": "frozen"}}
    assert float(optim.group_norms(GRADIENTS[0], without_bias)["low"]) == pytest.approx(0.5)
