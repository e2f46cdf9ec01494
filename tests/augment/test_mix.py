"""Mixup and CutMix: images, masks and losses worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from medtl_jax.augment.mix import PARTNER, Mix, check_mix, make_mix, mix_batch, mixed_loss
from medtl_jax.data.catalog import MISSING, TASKS
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.objectives import losses

SIZE = (6, 9)


def batch(n=5, channels=2, **labels):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (n, *SIZE, channels)).astype(np.float32)
    # Each image has a target of its own, which tells its partner.
    return {"image": image, **({"target": np.arange(n)} | labels)}


@functools.cache
def program(mix):
    return jax.jit(lambda key, batch: mix_batch(key, batch, mix))


def mixed(mix, key=0, **content):
    return jax.tree.map(np.asarray, program(mix)(jax.random.key(key), content or batch()))


def test_mixup_by_hand():
    given, found = batch(), mixed(Mix(mixup=1.0))
    order, share = found[PARTNER]["target"], found[PARTNER]["share"]
    assert sorted(order) == list(range(5)) and 0 < share < 1
    wanted = share * given["image"] + (1 - share) * given["image"][order]
    np.testing.assert_allclose(found["image"], wanted, atol=1e-6)
    np.testing.assert_array_equal(found["target"], given["target"])


@pytest.mark.parametrize("key", range(4))
def test_cutmix_pastes_one_box_and_shares_by_its_area(key):
    given, found = batch(), mixed(Mix(cutmix=1.0), key)
    order, share = found[PARTNER]["target"], found[PARTNER]["share"]
    own = (found["image"] == given["image"]).all(-1)
    pasted = (found["image"] == given["image"][order]).all(-1)
    moved = order != np.arange(5)
    assert (own[moved] ^ pasted[moved]).all() and own[~moved].all()
    box = pasted[np.argmax(moved)]
    assert (pasted[moved] == box).all()
    np.testing.assert_array_equal(box, box.any(1)[:, None] & box.any(0))
    for side in (box.any(1), box.any(0)):
        assert (np.diff(np.flatnonzero(side)) == 1).all(), "the box has no gaps"
    np.testing.assert_allclose(share, 1 - box.mean(), atol=1e-6)


def test_lambda_is_from_the_beta_distribution():
    def share(key):
        return mix_batch(key, {"image": jnp.zeros((2, 2, 2, 1)), "target": jnp.arange(2)}, mix)

    for alpha in (0.2, 1.0):
        mix = Mix(mixup=alpha)
        drawn = jax.jit(jax.vmap(lambda key: share(key)[PARTNER]["share"]))(
            jax.random.split(jax.random.key(1), 500)
        )
        assert scipy.stats.kstest(np.asarray(drawn), "beta", (alpha, alpha)).pvalue > 0.01


def test_the_area_of_cutmix_follows_its_alpha():
    """On average a part of the box lies outside: of a side s, s - s**2 / 4 is left."""
    one = {"image": jnp.zeros((2, 32, 32, 1)), "target": jnp.arange(2)}
    run = jax.jit(jax.vmap(lambda key: mix_batch(key, one, Mix(cutmix=1.0))[PARTNER]["share"]))
    share = np.asarray(run(jax.random.split(jax.random.key(0), 600)))
    # The centre is uniform on both axes, each for itself, and so is lambda = 1 - s**2.
    lam = (np.arange(10_000) + 0.5) / 10_000
    side = np.sqrt(1 - lam)
    assert abs((1 - share).mean() - ((side - side**2 / 4) ** 2).mean()) < 0.03


def test_with_both_on_each_batch_is_mixed_by_one_of_them():
    given, kinds = batch(), []
    for key in range(30):
        found = mixed(Mix(mixup=1.0, cutmix=1.0), key)
        order, share = found[PARTNER]["target"], found[PARTNER]["share"]
        up = share * given["image"] + (1 - share) * given["image"][order]
        moved = order != np.arange(5)
        if not moved.any():
            continue
        is_up = np.allclose(found["image"], up, atol=1e-5)
        kept = (found["image"] == given["image"]).all(-1)
        assert is_up or np.isclose(kept[moved].mean(), share, atol=1e-5)
        kinds.append(is_up)
    assert 8 < sum(kinds) < 22


def test_nothing_else_of_a_batch_changes_and_padding_goes_along():
    mask = np.array([True, True, False, True, False])
    found = mixed(Mix(mixup=1.0), **batch(mask=mask, source={"image": np.ones(3)}))
    order = found[PARTNER]["target"]
    np.testing.assert_array_equal(found[PARTNER]["mask"], mask[order])
    np.testing.assert_array_equal(found["mask"], mask)
    np.testing.assert_array_equal(found["source"]["image"], np.ones(3))


# ---- masks -------------------------------------------------------------------------------------


def masks(n=5):
    """Masks whose values tell the image that they are of."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, *SIZE)).copy()


def test_cutmix_pastes_the_masks_with_the_images():
    given = batch(target=masks())
    found = mixed(Mix(cutmix=1.0), 1, **given)
    order = found[PARTNER]["target"][:, 0, 0]
    pasted = (found["image"] == given["image"][order]).all(-1)
    wanted = np.where(pasted, order[:, None, None], np.arange(5)[:, None, None])
    np.testing.assert_array_equal(found["target"], wanted)
    assert found["target"].dtype == np.uint8 and found[PARTNER]["share"] == 1.0
    assert 0 < pasted[order != np.arange(5)].mean() < 1


def test_mixup_of_masks_shares_the_loss():
    found = mixed(Mix(mixup=1.0), **batch(target=masks()))
    np.testing.assert_array_equal(found["target"], masks())
    assert 0 < found[PARTNER]["share"] < 1


# ---- losses ------------------------------------------------------------------------------------


def quotient(term, out, content):
    value, count = mixed_loss(term, out, content, None, None)
    return float(value / count)


LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], np.float32))


def test_the_mixed_cross_entropy_by_hand():
    """lambda L(target) + (1 - lambda) L(partner's), both means over the weights of the classes."""
    weights = np.array([1.0, 2.0, 4.0], np.float32)
    term = losses.cross_entropy(weights)
    partner = {"target": np.array([1, 2, 0]), "share": np.float32(0.25)}
    content = {"target": np.array([0, 1, 2]), PARTNER: partner}
    own = -(np.log(0.7) + 2 * np.log(0.6) + 4 * np.log(0.5)) / 7
    other = -(2 * np.log(0.2) + 4 * np.log(0.3) + np.log(0.2)) / 7
    found = quotient(term, {"logits": LOGITS}, content)
    np.testing.assert_allclose(found, 0.25 * own + 0.75 * other, rtol=1e-6)


def test_mixed_labels_of_cross_entropy_are_mixed_one_hots():
    """Without weights the mixed loss is the cross-entropy of the mixed label."""
    term = losses.cross_entropy(np.ones(3, np.float32), label_smoothing=0.1)
    partner = {"target": np.array([1, 0, 2]), "share": np.float32(0.4)}
    content = {"target": np.array([0, 1, 2]), PARTNER: partner}
    label = 0.4 * np.eye(3) + 0.6 * np.eye(3)[[1, 0, 2]]
    wanted = -((0.9 * label + 0.1 / 3) * LOGITS).sum(1).mean()
    np.testing.assert_allclose(quotient(term, {"logits": LOGITS}, content), wanted, rtol=1e-6)


def of_task(task):
    """A loss, logits and targets of six examples of each task, with what may be missing."""
    rng = np.random.default_rng(1)
    weights = np.array([1.0, 3.0, 0.5], np.float32)
    logits = rng.standard_normal((6, 3), np.float32)
    labels = np.array([0, 1, 2, 2, 1, 0])
    if task == "multilabel":
        target = rng.integers(0, 2, (6, 3))
        target[[0, 3], [1, 2]] = MISSING
        return losses.binary_cross_entropy(weights, focal_gamma=1.0), logits, target
    if task == "ordinal":
        return losses.ordinal(weights, "corn"), logits[:, :2], labels
    if task == "segment":
        maps = rng.standard_normal((6, *SIZE, 3), np.float32)
        term = losses.add(losses.cross_entropy(weights), 1.0, losses.soft_dice(3))
        return term, maps, rng.integers(0, 3, (6, *SIZE))
    return losses.cross_entropy(weights, focal_gamma=2.0), logits, labels


@pytest.mark.parametrize("task", [task for task in TASKS if task != "regress"])
def test_the_loss_of_every_task_of_classes_is_shared(task):
    term, logits, target = of_task(task)
    order, share = np.array([3, 0, 5, 1, 2, 4]), np.float32(0.3)
    content = {"target": target, PARTNER: {"target": target[order], "share": share}}
    out = {"logits": logits}
    own, other = (float(v / c) for v, c in (term(out, {"target": t}, None, None)
                                            for t in (target, target[order])))  # fmt: skip
    assert abs(own - other) > 1e-3
    np.testing.assert_allclose(quotient(term, out, content), 0.3 * own + 0.7 * other, rtol=1e-5)
    alone = quotient(term, out, {"target": target})
    assert alone == own


# ---- numbers -----------------------------------------------------------------------------------


def numbers():
    """Three numbers of each of six images, some of them unknown."""
    found = np.random.default_rng(1).standard_normal((6, 3), np.float32)
    found[[1, 4], [0, 2]] = np.nan
    return found


def mixed_numbers(key=5, **content):
    """A batch whose images tell their share and their partner: image i is i everywhere."""
    image = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None, None], (6, *SIZE, 1))
    found = mixed(Mix(mixup=1.0), key, image=image, target=numbers(), **content)
    order = np.asarray(jax.random.permutation(named_key(jax.random.key(key), "partner"), 6))
    own = np.arange(6)
    moved = order != own
    share = (found["image"][moved, 0, 0, 0] - order[moved]) / (own - order)[moved]
    np.testing.assert_allclose(share, share[0], atol=1e-5)
    return found, order, share[0]


def test_numbers_are_mixed_as_their_images_are():
    found, order, share = mixed_numbers()
    assert 0.2 < share < 0.8 and PARTNER not in found
    wanted = share * numbers() + (1 - share) * numbers()[order]
    np.testing.assert_allclose(found["target"], wanted, atol=1e-5)
    unknown = np.isnan(numbers())
    np.testing.assert_array_equal(np.isnan(found["target"]), unknown | unknown[order])
    assert found["target"].dtype == np.float32


def test_what_is_mixed_with_padding_has_no_number():
    mask = np.array([True, True, False, True, True, False])
    found, order, _ = mixed_numbers(mask=mask)
    np.testing.assert_array_equal(found["mask"], mask & mask[order])


def test_the_huber_loss_of_a_mixed_image_is_least_at_the_mixed_number():
    """Also of numbers many deltas apart, where the losses of both are least at one of them."""
    _, order, share = mixed_numbers()
    target = np.where(np.isnan(numbers()), 0.0, 10.0 * numbers())
    given = {"image": np.zeros((6, *SIZE, 1), np.float32), "target": target.astype(np.float32)}
    content = mixed(Mix(mixup=1.0), 5, **given)
    term = losses.huber((0.0,) * 3, (1.0,) * 3, delta=1.0)
    wanted = share * target + (1 - share) * target[order]

    def loss(logits):
        value, count = mixed_loss(term, {"logits": logits}, content, None, None)
        return value / count

    at_the_mixed = np.asarray(jax.grad(loss)(jnp.asarray(wanted, jnp.float32)))
    np.testing.assert_allclose(at_the_mixed, 0.0, atol=1e-5)
    assert float(loss(jnp.asarray(wanted, jnp.float32))) < 1e-6
    # Nowhere else: the gradient points away from it.
    for step in (-3.0, -0.5, 0.5, 3.0):
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(wanted + step, jnp.float32)))
        assert (np.sign(gradient) == np.sign(step)).all()


def test_a_network_that_learns_from_mixed_numbers_has_finite_gradients():
    content, _, _ = mixed_numbers()
    term = losses.huber((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))

    def loss(logits):
        value, count = mixed_loss(term, {"logits": logits}, content, None, None)
        return value / count

    gradient = np.asarray(jax.grad(loss)(jnp.ones((6, 3))))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient != 0, ~np.isnan(content["target"]))


# ---- config ------------------------------------------------------------------------------------


def test_what_the_config_asks_for():
    assert make_mix({"mixup": 0.0, "cutmix": 0.0}) is None and make_mix({}) is None
    assert make_mix({"mixup": 0.2, "cutmix": 1.0}) == Mix(0.2, 1.0)
    for alpha in (-0.1, 101.0, float("nan")):
        with pytest.raises(UserError, match=r"augment.cutmix=.* must lie in 0..100"):
            make_mix({"cutmix": alpha})


@pytest.mark.parametrize("task", TASKS)
def test_a_number_is_no_share_of_an_area(task):
    check_mix({"mixup": 0.2, "cutmix": 0.0}, task)
    if task == "regress":
        with pytest.raises(UserError, match=r"augment.cutmix=1.0 means nothing for the task regr"):
            check_mix({"mixup": 0.0, "cutmix": 1.0}, task)
    else:
        check_mix({"mixup": 0.0, "cutmix": 1.0}, task)
