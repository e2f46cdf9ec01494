"""Domains made and taken apart, and the statistics of one domain through a real network."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.domain.statistics import norm_stages, of_domain, split_domains, with_domain
from medtl_jax.errors import UserError
from medtl_jax.models import registry
from medtl_jax.models.norms import STORED, Renorm
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.reestimate import make_reestimate

SIZE = 16
IMAGE = np.random.default_rng(0).standard_normal((8, SIZE, SIZE, 3), np.float32)


@pytest.fixture(scope="module")
def plain(tiny_model):
    """Variables of the plain tiny network with statistics that no norm begins with."""
    model, _ = tiny_model(dropout=0.0, momentum=0.5)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "var":
            return 1 + np.abs(values)
        return values / np.float32(np.sqrt(max(np.prod(leaf.shape[:-1]), 1)))

    return jax.tree_util.tree_map_with_path(draw, registry.variable_shapes(model, SIZE))


@pytest.fixture(scope="module")
def network(tiny_model):
    """`make(domains, affine)`: the tiny network."""
    return lambda domains=1, affine=False: tiny_model(
        dropout=0.0, momentum=0.5, domains=domains, domain_affine=affine
    )[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def applied(model, train, domain, variables, image, frozen=(), norms=None):
    (logits, out), moved = model.apply(
        variables, image, train, frozen, domain, norms=norms, mutable=["batch_stats"]
    )
    return logits, out["features"], {**variables, "batch_stats": moved["batch_stats"]}


def digest(tree):
    """SHA-256 over the paths and bytes of all leaves."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("domains", [2, 3])
def test_splitting_gives_the_variables_of_the_network_with_domains(plain, network, domains, affine):
    split = split_domains(plain, domains, affine)
    shapes = registry.variable_shapes(network(domains, affine), SIZE)
    assert jax.tree.structure(split) == jax.tree.structure(shapes)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(shapes), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for index in range(domains):
        assert digest(of_domain(split, index)) == digest(plain)


@pytest.mark.parametrize("affine", [False, True])
def test_a_new_domain_begins_as_the_pretrained_network(plain, network, affine):
    split = split_domains(plain, affine=affine)
    wanted = applied(network(), False, 0, plain, IMAGE)[0]
    for domain in (0, 1):
        found = applied(network(2, affine), False, domain, split, IMAGE)[0]
        np.testing.assert_array_equal(found, wanted)


NORMS = {
    "train": {},
    "stats": dict.fromkeys(("stem", "stage1", "stage2", "features"), STORED),
    "renorm": dict.fromkeys(("stem", "stage1", "stage2", "features"), Renorm(1.5, 0.5)),
}


@pytest.mark.parametrize("policy", NORMS)
@pytest.mark.parametrize("domain", [0, 1])
def test_training_in_a_domain_is_training_a_plain_network(plain, network, domain, policy):
    """And leaves the other domain's statistics and those of the frozen stem alone."""
    split = split_domains(plain)
    other = 1 - domain
    shifted = jax.tree.map(lambda x: x + 0.25, of_domain(split, other)["batch_stats"])
    split = with_domain(split, other, {**plain, "batch_stats": shifted})
    before = [digest(of_domain(split, index)) for index in (0, 1)]
    assert before[0] != before[1]
    arguments = IMAGE, ("stem",), NORMS[policy]
    logits, features, after = applied(network(2), True, domain, split, *arguments)
    wanted, wanted_features, moved = applied(network(), True, 0, plain, *arguments)
    np.testing.assert_array_equal(logits, wanted)
    np.testing.assert_array_equal(features, wanted_features)
    assert digest(of_domain(after, other)) == before[other]
    assert digest(of_domain(after, domain)) == digest(moved)
    assert (digest(moved) == digest(plain)) == (policy == "stats")
    for tree in (after, moved):
        was = split if tree is after else plain
        assert digest(tree["batch_stats"]["stem"]) == digest(was["batch_stats"]["stem"])


def test_domains_taken_apart_and_put_back(plain):
    split = split_domains(plain, 3, affine=True)
    changed = jax.tree.map(lambda x: x + 1, plain)
    back = with_domain(split, 1, changed)
    assert digest(of_domain(back, 1)) == digest(changed)
    norm = back["params"]["stem"]["norm"]
    np.testing.assert_array_equal(norm["scale"], plain["params"]["stem"]["norm"]["scale"])
    np.testing.assert_array_equal(norm["domain1"]["scale"], norm["scale"] + 1)
    np.testing.assert_array_equal(norm["domain2"]["scale"], norm["scale"])
    # What is shared is replaced for all.
    kernel = of_domain(back, 2)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, plain["params"]["head"]["kernel"] + 1)
    statistics = of_domain(back, 2)["batch_stats"]
    assert digest(statistics) == digest(plain["batch_stats"])


def test_what_is_not_of_the_network_is_handed_on(plain):
    split = split_domains({**plain, "note": 3})
    assert split["note"] == of_domain(split, 1)["note"] == 3


def test_domains_that_are_not_there_are_refused(plain):
    split = split_domains(plain)
    assert digest(of_domain(plain, 0)) == digest(plain)
    for variables, index in ((plain, 1), (split, 2)):
        with pytest.raises(ValueError, match=f"domain {index}: the variables have no statistics"):
            of_domain(variables, index)
        with pytest.raises(ValueError, match=f"domain {index}: the variables have no statistics"):
            with_domain(variables, index, plain)
    for variables, domains in ((plain, 1), (split, 2)):
        with pytest.raises(ValueError, match=f"domains={domains}: want 2 or more"):
            split_domains(variables, domains)


def test_a_network_without_norms_is_one_line():
    model, _ = registry.create_model("lenet5", 3)
    variables = registry.variable_shapes(model, 28)
    assert of_domain(variables, 0) == variables
    with pytest.raises(UserError, match="domain-specific batch norm adapts the statistics"):
        split_domains(variables)
    with pytest.raises(UserError, match="AdaBN adapts the statistics of batch norms, and this"):
        norm_stages(variables, "AdaBN")
    with pytest.raises(ValueError, match="domain 1"):
        of_domain(variables, 1)


def test_adabn_gives_the_statistics_of_the_target_and_leaves_the_rest(plain, tiny_model):
    """Also for a domain of its own: taken apart, re-estimated and put back."""
    model, spec = tiny_model()
    images = np.random.default_rng(2).integers(0, 128, (16, SIZE, SIZE, 3), np.uint8)
    stages = norm_stages(plain, "AdaBN")
    assert set(stages) == {"stem", "stage1", "stage2", "features"}
    adapt = make_reestimate(model, spec, stages, data_mesh())
    found = adapt(plain, images, np.arange(16, dtype=np.int32)[None])
    assert digest(found["params"]) == digest(plain["params"])
    # With one batch of all: in training mode the momentum 0 leaves that batch's own.
    normalized = registry.inputs.normalize(jnp.asarray(images), spec.input)
    exact = model.clone(momentum=0.0, dropout=0.0)
    wanted = applied(exact, True, 0, plain, normalized)[2]["batch_stats"]
    for a, b in zip(jax.tree.leaves(found["batch_stats"]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    split = split_domains(plain)
    both = with_domain(split, 1, adapt(of_domain(split, 1), images, np.arange(16)[None]))
    assert digest(of_domain(both, 0)) == digest(plain)
    assert digest(of_domain(both, 1)) == digest(found)
