"""From `domain.method` to loss terms: the grammar, the tasks, what each term is of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtl_jax.domain.adversary import (
    DISCRIMINATOR,
    Adversary,
    Discriminator,
    MapDiscriminator,
)
from medtl_jax.domain.alignment import class_confusion, coral, multi_kernel_mmd
from medtl_jax.domain.methods import (
    ADVERSARIAL,
    METHODS,
    READERS,
    check_method,
    make_domain_terms,
    parse_method,
)
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task

CLASSIFY = Task("classify", ("a", "b", "c"))
ORDINAL = Task("ordinal", ("a", "b", "c"), ordinal="corn")
MASKS = Task("segment", ("a", "b", "c"))


def outputs(seed, count=6, answers=3):
    rng = np.random.default_rng(seed)
    shapes = {"stage1": (count, 8, 8, 5), "features": (count, 4), "logits": (count, answers)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def value(term, out, target, params=None, strength=1.0):
    batch = {"adaptation": jnp.float32(strength), "target_domain": {"out": target}}
    total, count = term(out, batch, params or {}, None)
    return float(total / count)


# ---- the grammar -------------------------------------------------------------------------------


def test_none_is_no_term():
    assert parse_method("none") == () and make_domain_terms("none", CLASSIFY, outputs(0)) == ()


@given(
    st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=4, unique=True),
    st.data(),
)
def test_a_sum_is_read_as_it_is_written(names, data):
    factors = [data.draw(st.floats(1e-3, 1e3)) for _ in names]
    text = " + ".join(f"{f!r}*{name}" for f, name in zip(factors, names, strict=True))
    against = [name for name in names if name in ADVERSARIAL]
    if len(against) < 2:
        assert parse_method(text) == tuple(zip(factors, names, strict=True))
        return
    with pytest.raises(UserError, match=f"{' and '.join(against)} want a discriminator each"):
        parse_method(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not known"),
        ("DANN", "'DANN' is not known; write none, or losses as in 'cdan_e [+] 0.1[*]mcc', of da"),
        ("mmd + mmd", "mmd stands there twice"),
        ("0*mmd", "the factor '0' must be a positive finite number"),
        ("-1*mmd", "the factor '-1' must be"),
        ("mmd - coral", "is not known"),
        ("inf*mmd", "the factor 'inf' must be"),
        ("1e999*mmd", "the factor '1e999' must be"),
        ("*mmd", "the factor '' must be"),
    ],
)
def test_other_sums_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_method(text)


# ---- tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "able"),
    [
        ("classify", set(METHODS)),
        ("ordinal", set(METHODS)),
        ("multilabel", {"dann", "mmd", "coral"}),
        ("regress", {"dann", "mmd", "coral"}),
        ("segment", {"dann", "mmd", "coral", "entropy"}),
    ],
)
def test_what_reads_single_classes_is_not_for_other_tasks(task, able):
    for name in METHODS:
        if name in able:
            check_method(name, task)
        else:
            with pytest.raises(UserError, match=f"{name} is not for task={task}; choose from dan"):
                check_method(f"0.5*{name}", task)


@pytest.mark.parametrize("task", ["multilabel", "regress"])
def test_answers_that_are_no_distribution_are_none_for_a_discriminator(task):
    for name in READERS[1:]:
        check_method(name, task, "logits")
    with pytest.raises(UserError, match=f"domain.reads=logits: .* task={task} has not"):
        check_method("dann", task, "logits")


def test_an_entry_that_the_network_has_not_is_named():
    with pytest.raises(
        UserError, match=r"cannot read 'stage9' .*; choose from stage1, features, l"
    ):
        make_domain_terms("dann", CLASSIFY, outputs(0), "stage9")


# ---- terms -------------------------------------------------------------------------------------


def test_terms_and_factors_are_those_of_the_sum():
    """Against the functions that the references of `test_alignment` prove."""
    text = "2*mmd + 0.5*coral + 0.1*mcc + entropy"
    out, target = outputs(1), outputs(2, count=7)
    found = [
        (factor, value(term, out, target))
        for factor, term in make_domain_terms(text, CLASSIFY, out)
    ]
    answers = jax.nn.log_softmax(target["logits"])
    wanted = [
        (2.0, multi_kernel_mmd(out["features"], target["features"])),
        (0.5, coral(out["features"], target["features"])),
        (0.1, class_confusion(jax.nn.log_softmax(target["logits"] / 2.5))),
        (1.0, -(np.exp(answers) * answers).sum(-1).mean()),
    ]
    np.testing.assert_allclose(found, np.array(wanted, np.float32), rtol=1e-5)


def test_what_is_read_of_a_map_is_its_mean():
    out, target = outputs(1), outputs(2)
    ((_, term),) = make_domain_terms("coral", CLASSIFY, out, "stage1")
    wanted = coral(out["stage1"].mean((1, 2)), target["stage1"].mean((1, 2)))
    assert value(term, out, target) == pytest.approx(float(wanted), rel=1e-5)


def test_the_discriminator_comes_first_and_fits_what_it_reads():
    out = outputs(0)
    for reads, kind in (("", Discriminator), ("stage1", MapDiscriminator)):
        (_, first), (factor, _) = make_domain_terms("0.1*mmd + dann", CLASSIFY, out, reads, 8)
        assert isinstance(first, Adversary) and isinstance(first.discriminator, kind)
        assert factor == 0.1
        params = {DISCRIMINATOR: first.initialize(out, jax.random.key(0))}
        assert 0.6 < value(first, out, outputs(1), params) < 0.8  # ln 2, where it knows nothing


def test_each_adversary_is_what_its_name_says():
    for name in ADVERSARIAL:
        ((_, term),) = make_domain_terms(name, CLASSIFY, outputs(0), width=8)
        assert term.conditional == (name != "dann")
        assert term.entropy_weights == (name == "cdan_e")
        assert term.discriminator.width == 8


@pytest.mark.parametrize("name", ["dann", "cdan"])
def test_ranks_are_read_by_their_own_probabilities(name):
    """Two logits stand for three ranks: of P(> 0), and of P(> 1) where it is above 0."""
    out = outputs(3, answers=2)
    reads = "logits" if name == "dann" else ""
    ((_, term),) = make_domain_terms(name, ORDINAL, out, reads, width=8)
    above = np.cumprod(1 / (1 + np.exp(-out["logits"].astype(np.float64))), axis=1)
    wanted = np.stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]], axis=1)
    found = term.inputs(out, jnp.float32(1.0))
    if name == "cdan":
        wanted = (out["features"][:, :, None] * wanted[:, None]).reshape(6, 12)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_masks_are_judged_by_their_probabilities():
    rng = np.random.default_rng(0)
    out = {name: rng.standard_normal((2, 16, 16, 3), np.float32) for name in ("stage1", "logits")}
    out["features"] = out["stage1"].mean((1, 2))
    ((_, term),) = make_domain_terms("dann", MASKS, out, "logits")
    assert isinstance(term.discriminator, MapDiscriminator)
    found = term.inputs(out, jnp.float32(1.0))
    np.testing.assert_allclose(np.asarray(found).sum(-1), 1, rtol=1e-5)
    params = {DISCRIMINATOR: term.initialize(out, jax.random.key(0))}
    # The same maps on both sides: what it tells right of one it tells wrong of the other.
    batch = {"adaptation": jnp.ones(()), "target_domain": {"out": out}}
    assert float(term.judge(out, batch, params).accuracy) == pytest.approx(0.5)
