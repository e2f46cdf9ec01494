"""L_pre by hand, against NumPy and SciPy, and the source paper's two update rules on a toy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.registry import ModelSpec
from medtl_jax.objectives import losses, pretrain
from medtl_jax.objectives.cotuning import class_relation, cotuning
from medtl_jax.objectives.delta import channel_importance, delta
from medtl_jax.objectives.retention import bss, l2sp, lwf, replay
from medtl_jax.objectives.task import Task
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.step import StepParts, Term, create_state, train_step
from medtl_jax.transfer.groups import label_tree

RNG = np.random.default_rng(0)
SOURCE = Task("classify", ("a", "b", "c"))
TARGET = Task("classify", ("no", "yes"))
TABLE = {"stage1": "low", "source_head": "low", "head": "high"}
PRETRAINED = ("stage1", "source_head")
RATE, TEMPERATURE = 0.1, 2.0
EVERY = "l2sp + delta + lwf + replay + cotuning + bss"


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def mean(term, out, batch, params=None, anchor=None):
    """Sum over count, as the step divides."""
    value, count = term(out, batch, params, anchor)
    return value / count


class Toy(nn.Module):
    """A hidden layer, tanh(x W), under a new head and the pretrained one; no biases."""

    @nn.compact
    def __call__(
        self,
        image,
        train=False,
        frozen=(),
        domain=0,
        taps=None,
        norms=None,
        start="",
        remat=False,
    ):
        dense = functools.partial(nn.Dense, use_bias=False)
        maps = jnp.tanh(dense(4, name="stage1")(image)) + (taps or {}).get("stage1", 0.0)
        features = maps.mean((1, 2))
        out = {"stage1": maps, "features": features}
        out["source_logits"] = dense(3, name="source_head")(features)
        return dense(2, name="head")(features), out


SPEC = ModelSpec(
    name="toy",
    build=Toy,
    stages=("stage1",),
    head="head",
    input=InputSpec((127.5,) * 3, (127.5,) * 3),
    norm_momentum=0.9,
    smallest_input=1,
)
PARAMS = {
    "stage1": {"kernel": draw(3, 4)},
    "source_head": {"kernel": draw(4, 3)},
    "head": {"kernel": draw(4, 2)},
}
# Training has gone on for a while: the parameters are not the anchor any more.
ANCHOR = jax.tree.map(lambda leaf: leaf + 0.5 * draw(*leaf.shape), PARAMS)
IMAGES = RNG.integers(0, 256, (5, 1, 1, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 1, 0, 1], np.int32)
SOURCE_BATCH = {"image": IMAGES[::-1].copy(), "target": np.array([0, 1, 2, 2, 1], np.int32)}


@functools.cache
def updater(text):
    """`fn(alpha, beta) -> params` after one step of SGD, compiled once for all weights."""
    term = pretrain.make_pretrain_term(
        text,
        anchored=PRETRAINED,
        source=SOURCE,
        source_terms={"logits": losses.cross_entropy(np.ones(3, np.float32))},
        temperature=TEMPERATURE,
        importance={"stage1": np.arange(4, dtype=np.float32)},
        relation=np.full((2, 3), 1 / 3, np.float32),
    )
    new = losses.cross_entropy(np.ones(2, np.float32))

    @jax.jit
    def update(alpha, beta):
        parts = StepParts(
            model=Toy(),
            spec=SPEC,
            optimizer=optax.sgd(RATE),
            table=TABLE,
            labels=label_tree(PARAMS, TABLE),
            terms=(Term("new", lambda step: beta, new), Term("pre", lambda step: alpha, term)),
            augment=lambda key, image, masks: (image, masks),
            teacher=True,
        )
        state = create_state({"params": PARAMS, "batch_stats": {}}, parts)
        state = state.replace(anchor={"params": ANCHOR, "batch_stats": {}})
        batch = {"image": IMAGES, "target": LABELS, "source": SOURCE_BATCH}
        return train_step(state, batch, jax.random.key(0), parts=parts)[0].params

    return lambda alpha, beta: jax.device_get(update(np.float32(alpha), np.float32(beta)))


def by_hand(text, alpha, beta):
    """The two rules of the source paper with gradients written out, in float64."""
    kernels = {name: layer["kernel"].astype(np.float64) for name, layer in PARAMS.items()}
    before = {name: layer["kernel"].astype(np.float64) for name, layer in ANCHOR.items()}
    x = (IMAGES.reshape(5, 3) - 127.5) / 127.5
    hidden = np.tanh(x @ kernels["stage1"])

    def below(error, head):
        """Gradient of the hidden layer's kernel for an error of the logits of `head`."""
        return x.T @ (error @ kernels[head].T * (1 - hidden**2))

    error = (scipy.special.softmax(hidden @ kernels["head"], -1) - np.eye(2)[LABELS]) / 5
    new = {"stage1": below(error, "head"), "head": hidden.T @ error, "source_head": 0.0}
    if text == "l2sp":
        pre = {name: kernels[name] - before[name] for name in PRETRAINED}
    else:
        answers = hidden @ kernels["source_head"]
        wanted = np.tanh(x @ before["stage1"]) @ before["source_head"]
        error = scipy.special.softmax(answers / TEMPERATURE, -1)
        error = TEMPERATURE * (error - scipy.special.softmax(wanted / TEMPERATURE, -1)) / 5
        pre = {"stage1": below(error, "source_head"), "source_head": hidden.T @ error}
    moved = {name: kernels[name] - RATE * (alpha * pre[name] + beta * new[name]) for name in pre}
    return {**moved, "head": kernels["head"] - RATE * beta * new["head"]}


@pytest.mark.parametrize("text", ["l2sp", "lwf"])
@settings(max_examples=25)
@given(alpha=st.floats(0, 10), beta=st.floats(0.01, 10))
def test_the_two_update_rules(text, alpha, beta):
    got = updater(text)(alpha, beta)
    for name, wanted in by_hand(text, alpha, beta).items():
        np.testing.assert_allclose(got[name]["kernel"], wanted, rtol=1e-6, atol=1e-6)


def test_new_layers_see_nothing_of_l_pre():
    with_alpha, without = updater(EVERY)(10.0, 1.0), updater(EVERY)(0.0, 1.0)
    np.testing.assert_array_equal(with_alpha["head"]["kernel"], without["head"]["kernel"])
    for stage in PRETRAINED:
        assert np.abs(with_alpha[stage]["kernel"] - without[stage]["kernel"]).max() > 1e-3
    assert np.abs(without["head"]["kernel"] - PARAMS["head"]["kernel"]).max() > 1e-3


def test_l2sp_by_hand():
    params = {
        "stage1": {"norm": {"scale": jnp.array([1.0, 2.0])}, "kernel": jnp.array([[3.0]])},
        "stage2": {"bias": jnp.array([9.0])},
        "head": {"bias": jnp.array([7.0])},
    }
    before = jax.tree.map(jnp.zeros_like, params)
    anchor = {"params": {**before, "head": {}}, "batch_stats": {}}
    assert float(mean(l2sp(("stage1",)), {}, {}, params, anchor)) == (1 + 4 + 9) / 2
    # A phase in which the head alone trains holds on to nothing.
    assert float(mean(l2sp(()), {}, {}, params, anchor)) == 0
    slope = jax.grad(lambda p: mean(l2sp(("stage1", "stage2")), {}, {}, p, anchor))(params)
    wanted = {**params, "head": before["head"]}
    jax.tree.map(np.testing.assert_array_equal, slope, wanted)


def distribution(logits, temperature, task):
    """Li & Hoiem's: probabilities to the power 1 / T, normalised again."""
    if task.name == "multilabel":
        present = scipy.special.expit(logits.astype(np.float64))
        probability = np.stack([1 - present, present], -1)
    else:
        probability = task.score(logits).astype(np.float64)
    power = probability ** (1 / temperature)
    return power / power.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "task",
    [
        SOURCE,
        Task("multilabel", ("a", "b", "c")),
        Task("ordinal", ("a", "b", "c", "d")),
        Task("ordinal", ("a", "b", "c", "d"), "cumulative"),
    ],
    ids=lambda task: task.name + task.ordinal * (task.name == "ordinal"),
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_lwf_is_the_divergence_of_the_softened_answers(task, temperature):
    now, before = 2 * draw(4, 3), 2 * draw(4, 3)
    p, q = distribution(before, temperature, task), distribution(now, temperature, task)
    wanted = temperature**2 * scipy.special.rel_entr(p, q).sum(-1).reshape(4, -1).mean(-1)
    term, teacher = lwf(task, temperature), {"source_logits": before}
    got = mean(term, {"source_logits": now}, {"teacher": teacher})
    np.testing.assert_allclose(got, wanted.mean(), rtol=1e-5)
    mask = np.array([True, False, True, False])
    got = mean(term, {"source_logits": now}, {"teacher": teacher, "mask": mask})
    np.testing.assert_allclose(got, wanted[mask].mean(), rtol=1e-5)
    assert abs(float(mean(term, teacher, {"teacher": teacher}))) < 1e-6


def test_lwf_of_numbers_is_their_squared_error():
    task = Task("regress", ("age", "size"), mean=(0.0, 0.0), std=(1.0, 1.0))
    now, before = np.float32([[1, 2], [0, 0]]), np.float32([[0, 0], [0, 2]])
    batch = {"teacher": {"source_logits": before}}
    assert float(mean(lwf(task, 3.0), {"source_logits": now}, batch)) == (1 + 4 + 0 + 4) / 4


def test_answers_of_another_width_are_an_error():
    # One logit would broadcast against three.
    out = {"source_logits": jnp.zeros((4, 1))}
    with pytest.raises(ValueError, match="source_logits are"):
        lwf(SOURCE, 2.0)(out, {"teacher": out}, None, None)
    with pytest.raises(ValueError, match="no task segment"):
        lwf(Task("segment", ("a", "b")), 2.0)


def test_replay_is_the_loss_of_the_source():
    term = replay(losses.cross_entropy(np.ones(2, np.float32)))
    answers = {"source_logits": np.log(np.float32([[3, 1], [1, 1], [1, 3]]))}
    source = {"target": np.array([0, 1, 0]), "out": answers, "mask": np.array([True, True, False])}
    # The head's logits, here of another width, are not looked at.
    got = mean(term, {"logits": np.zeros((3, 5))}, {"target": np.zeros(3), "source": source})
    np.testing.assert_allclose(got, (np.log(4 / 3) + np.log(2)) / 2, rtol=1e-6)


def test_delta_without_attention_is_the_mean_distance():
    now = {"stage1": np.zeros((2, 2, 2, 2), np.float32), "features": np.ones((2, 3), np.float32)}
    before = {"stage1": now["stage1"].copy(), "features": np.zeros((2, 3), np.float32)}
    before["stage1"][0, 0, 0] = 2.0, 4.0
    batch = {"teacher": before, "target": np.zeros(2)}
    stages = ("stage1", "source_head")
    by_maps = (4 + 16) / 8
    assert float(mean(delta(stages), now, batch)) == by_maps / 2
    even = {"stage1": np.full(2, 7.0)}
    assert float(mean(delta(stages, even), now, batch)) == by_maps / 2
    assert float(mean(delta((*stages, "features")), now, batch)) == by_maps / 2 + 1
    # An attention of 2 * (3/4, 1/4), and the second image is padding.
    uneven = {"stage1": np.log([3.0, 1.0])}
    batch["mask"] = np.array([True, False])
    got = mean(delta(stages, uneven), now, batch)
    np.testing.assert_allclose(got, (1.5 * 4 + 0.5 * 16) / 8, rtol=1e-6)
    with pytest.raises(ValueError, match="importance of stage1"):
        delta(stages, {"stage1": np.zeros(3)})(now, batch, None, None)


def test_importance_is_what_a_channel_contributes():
    # The loss, the sum of the logits, is linear in the map: the first order is exact.
    images = RNG.integers(0, 256, (5, 2, 2, 3)).astype(np.uint8)

    def term(out, batch, params, anchor):
        return jnp.where(batch["mask"], out["logits"].sum(-1), 0.0).sum(), batch["mask"].sum()

    stages = ("stage1", "features", "source_head")
    got = channel_importance(
        Toy(), SPEC, {"params": PARAMS}, images, LABELS, term, stages, batch_size=3
    )
    maps = np.tanh((images - 127.5) / 127.5 @ PARAMS["stage1"]["kernel"]).mean((0, 1, 2))
    assert got.keys() == {"stage1"}
    np.testing.assert_allclose(got["stage1"], -maps * PARAMS["head"]["kernel"].sum(1), rtol=1e-5)


def test_relation_of_classes_by_hand():
    logits = np.log(np.float32([[8, 1, 1], [2, 6, 2], [1, 1, 2]]))
    relation = class_relation(TARGET, SOURCE, logits, np.array([1, 1, 0]))
    np.testing.assert_allclose(relation, [[0.25, 0.25, 0.5], [0.5, 0.35, 0.15]], rtol=1e-6)
    batch = {"target": np.array([1, 0]), "mask": np.array([True, False])}
    got = mean(cotuning(relation), {"source_logits": logits[:2]}, batch)
    wanted = -(0.5 * np.log(0.8) + 0.35 * np.log(0.1) + 0.15 * np.log(0.1))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    with pytest.raises(UserError, match="'yes' has none"):
        class_relation(TARGET, SOURCE, logits, np.zeros(3, np.int32))
    multilabel = Task("multilabel", ("x", "y"))
    with pytest.raises(UserError, match="this task is multilabel"):
        class_relation(multilabel, SOURCE, logits, np.zeros((3, 2)))
    with pytest.raises(UserError, match="pretrained classifier is multilabel"):
        class_relation(TARGET, multilabel, logits, np.zeros(3))


def smallest(features, batch):
    return jax.jit(jax.value_and_grad(lambda f: mean(bss, {"features": f}, batch)))(features)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 3)])
def test_bss_against_svd(shape):
    features = draw(*shape)
    left, values, right = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    value, slope = smallest(features, {})
    np.testing.assert_allclose(value, values[-1] ** 2, rtol=1e-4)
    wanted = 2 * values[-1] * np.outer(left[:, -1], right[-1])
    np.testing.assert_allclose(slope, wanted, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 4)])
def test_padding_changes_no_singular_value(shape):
    features, mask = draw(*shape), np.arange(shape[0]) % 3 > 0
    value, slope = smallest(features, {"mask": mask})
    np.testing.assert_allclose(value, smallest(features[mask], {})[0], rtol=1e-4)
    assert (np.asarray(slope)[~mask] == 0).all() and np.abs(slope).max() > 0


@pytest.mark.parametrize("features", [np.zeros((4, 6)), np.ones((4, 6)), np.eye(4, 6)])
def test_bss_is_finite_where_singular_values_are_equal(features):
    # Equal images, or none at all; of the unit matrix any unit vector will do.
    value, slope = smallest(np.float32(features), {})
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(value, float((features == np.eye(4, 6)).all()), atol=1e-6)


def test_bss_of_a_batch_on_four_devices():
    features = draw(8, 6)
    parts = jax.device_put(features, data_mesh(4).batched)
    assert len(parts.sharding.device_set) == 4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        smallest(parts, {}),
        smallest(features, {}),
    )


def test_losses_are_added_with_their_factors():
    params, before = {"stage1": jnp.array([2.0])}, {"params": {"stage1": jnp.array([0.0])}}
    out = {"features": np.float32([[3, 0], [0, 2]])}
    term = pretrain.make_pretrain_term("0.5*l2sp + 1e+1*bss", anchored=("stage1",))
    value, count = term(out, {}, params, before)
    np.testing.assert_allclose(value, 0.5 * 2 + 10 * 4, rtol=1e-6)
    assert count == 1
    with pytest.raises(ValueError, match="nothing given for lwf"):
        pretrain.make_pretrain_term("l2sp + lwf", anchored=("stage1",))
    with pytest.raises(ValueError, match="nothing given"):
        pretrain.make_pretrain_term("none", anchored=("stage1",))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("none", ()),
        ("l2sp", ((1.0, "l2sp"),)),
        (" 2 * lwf+.5*bss ", ((2.0, "lwf"), (0.5, "bss"))),
        ("1e+3*delta + 1.E-2*replay", ((1000.0, "delta"), (0.01, "replay"))),
    ],
)
def test_what_pretrain_loss_may_say(text, parts):
    assert pretrain.parse_pretrain_loss(text) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l2", "'l2' is not known; .* l2sp, delta, lwf, replay, cotuning, bss"),
        ("", "'' is not known"),
        ("l2sp +", "'' is not known"),
        ("none + l2sp", "'none' is not known"),
        ("l2sp*2", "'2' is not known"),
        ("l2sp - bss", "'l2sp - bss' is not known"),
        ("l2sp + 2*l2sp", "l2sp stands there twice"),
        ("-1*l2sp", "factor '-1'"),
        ("0*l2sp", "factor '0'"),
        ("nan*l2sp", "factor 'nan'"),
        ("1e999*l2sp", "factor '1e999'"),
        ("*l2sp", "factor ''"),
        ("2*3*l2sp", r"factor '2\*3'"),
    ],
)
def test_what_pretrain_loss_may_not_say(text, message):
    with pytest.raises(UserError, match=message):
        pretrain.parse_pretrain_loss(text)


def test_needs():
    assert pretrain.needs("none") == pretrain.needs("bss") == frozenset()
    assert pretrain.needs("bss + 2*l2sp") == {"anchor"}
    assert pretrain.needs("delta + replay") == {"anchor", "teacher", "source_head", "source_data"}


def transfer(**changes):
    """`config.transfer` as far as L_pre goes."""
    default = {
        "pretrain_loss": "none",
        "alpha": 0.0,
        "beta": 1.0,
        "alpha_schedule": "constant",
        "beta_schedule": "constant",
        "temperature": 2.0,
    }
    return {**default, **changes}


@pytest.mark.parametrize(
    ("changes", "weights", "head", "data"),
    [
        ({}, False, False, False),
        ({"pretrain_loss": "bss", "alpha": 0.1}, False, False, False),
        ({"pretrain_loss": "l2sp + delta", "alpha": 0.1}, True, False, False),
        ({"pretrain_loss": "lwf + cotuning", "alpha": 1}, True, True, False),
        ({"pretrain_loss": EVERY, "alpha": 1, "alpha_schedule": "ramp"}, True, True, True),
    ],
)
def test_what_can_be_had_passes(changes, weights, head, data):
    pretrain.check_pretrain(transfer(**changes), weights, head, data)


@pytest.mark.parametrize(
    ("changes", "missing", "message"),
    [
        ({"alpha": 0.1}, "", r"alpha=0.1 has no effect with transfer.pretrain_loss=none"),
        ({"pretrain_loss": "l2sp"}, "", "no effect with transfer.alpha=0"),
        ({"pretrain_loss": "l2sp", "alpha": -1.0}, "", "alpha=-1.0 must"),
        ({"pretrain_loss": "l2sp", "alpha": float("nan")}, "", "alpha=nan must"),
        ({"beta": 0.0}, "", "beta=0.0 must"),
        ({"beta": float("inf")}, "", "beta=inf must"),
        ({"temperature": 0.0}, "", "temperature=0.0 must"),
        ({"alpha_schedule": "exp"}, "", "alpha_schedule='exp' .* constant, linear, cosine, ramp"),
        ({"beta_schedule": ""}, "", "beta_schedule='' is not known"),
        ({"pretrain_loss": "bss + l2sp", "alpha": 1.0}, "weights", "l2sp .* set model.weights"),
        ({"pretrain_loss": "lwf", "alpha": 1.0}, "head", "lwf needs the classifier"),
        ({"pretrain_loss": "cotuning", "alpha": 1.0}, "head", "cotuning needs the classifier"),
        ({"pretrain_loss": "replay", "alpha": 1.0}, "head", "replay needs the classifier"),
        ({"pretrain_loss": "replay", "alpha": 1.0}, "data", "set transfer.source.name"),
    ],
)
def test_what_cannot_be_had_is_one_line(changes, missing, message):
    given = [name != missing for name in ("weights", "head", "data")]
    with pytest.raises(UserError, match=message) as error:
        pretrain.check_pretrain(transfer(**changes), *given)
    assert "\n" not in str(error.value)


def test_schedules():
    assert pretrain.weight_schedule("constant", 2, 10) == 2.0
    wanted = {"linear": [4, 3, 2, 1, 0], "ramp": [0, 1, 2, 3, 4]}
    wanted["cosine"] = [2 + 2 * np.cos(np.pi * step / 4) for step in range(5)]
    for kind, values in wanted.items():
        schedule = pretrain.weight_schedule(kind, 4.0, 5)
        got = jax.vmap(schedule)(jnp.arange(5))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, values, atol=1e-6)
    assert float(pretrain.weight_schedule("linear", 4.0, 1)(0)) == 4.0
    with pytest.raises(UserError, match="'exp' is not known"):
        pretrain.weight_schedule("exp", 1.0, 10)
