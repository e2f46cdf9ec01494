"""Averaging over views: hand-computed means, and draws that know an image by its id alone."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.augment.presets import fill_preset
from medtl_jax.data.streams import Streamed
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import InputSpec
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.views import check_views, make_view_predict, view_transforms

IDS = np.array([f"patient {number}" for number in range(13)])
EVERYTHING = {
    "flip_horizontal": 0.5,
    "rotate": 20.0,
    "brightness": 0.2,
    "noise": 0.1,
}


class Corner(nn.Module):
    """Logits `[b, 2]`: the pixels in the upper left and in the upper right corner."""

    @nn.compact
    def __call__(self, image, train=False, start=""):
        return jnp.stack([image[:, 0, 0, 0], image[:, 0, -1, 0]], axis=-1), {}


class Columns(nn.Module):
    """Logits `[b, h, w, 2]`: each pixel, and the number of its column."""

    @nn.compact
    def __call__(self, image, train=False, start=""):
        columns = jnp.arange(image.shape[2], dtype=jnp.float32)[:, None]
        return jnp.concatenate([image, jnp.broadcast_to(columns, image.shape)], axis=-1), {}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (13, 8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def make(tiny_model):
    """`make(network, **options) -> predict`; the network reads pixels as they are."""
    plain = dataclasses.replace(tiny_model()[1], input=InputSpec((0.0,), (1.0,)))

    def build(network, augment, views=2, devices=1, batch_size=5, seed=0, ids=IDS, **options):
        return make_view_predict(
            network, plain, data_mesh(devices), batch_size,
            augment=augment, views=views, seed=seed, ids=ids, **options,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("views", [2, 3, 5])
def test_the_first_view_is_the_image_and_the_others_are_drawn(make, images, views):
    found = make(Corner(), {"flip_horizontal": 1.0}, views)({}, images)
    corners = images[:, 0, [0, -1], 0].astype(np.float64)
    wanted = (corners + (views - 1) * corners[:, ::-1]) / views
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_is_made_of_the_logits_is_averaged_not_the_logits(make, images):
    predict = make(Corner(), {"flip_horizontal": 1.0})
    found = predict({}, images, lambda logits: logits**2)
    corners = images[:, 0, [0, -1], 0].astype(np.float64)
    wanted = np.broadcast_to((corners**2).mean(1, keepdims=True), (13, 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert (np.abs(found - corners.mean(1, keepdims=True) ** 2) > 1).any()


def test_mirrored_scores_are_mirrored_back(make, images):
    found = make(Columns(), {"flip_horizontal": 1.0}, views=4, masks=True)({}, images)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[..., :1], images)
    ramp = np.arange(8.0)
    wanted = np.broadcast_to((ramp + 3 * ramp[::-1]) / 4, (13, 8, 8))
    np.testing.assert_allclose(found[..., 1], wanted, atol=1e-2)


def test_every_flip_and_turn_is_undone(make, images):
    turns = {"flip_horizontal": 0.5, "flip_vertical": 0.5, "quarter_turns": 0.75}
    found = make(Columns(), turns, views=6, masks=True)({}, images)
    np.testing.assert_array_equal(found[..., :1], images)
    # The views differ between images, or nothing would have been drawn.
    assert len({row.tobytes() for row in found[..., 1]}) > 6


def test_intensities_of_masks_move_no_pixel(make, images):
    """Beside flips and turns: the scores of a pixel are those of its brightened self."""
    turns = {"flip_horizontal": 0.5, "flip_vertical": 0.5, "quarter_turns": 0.75}
    dark = images // 4 + 80
    found = make(Columns(), {**turns, "brightness": 0.2}, views=2, masks=True)({}, dark)
    change = 2 * (found[..., 0].astype(float) - dark[..., 0])
    # One change an image, whatever its pixels, of 0.2 times 255 at most.
    np.testing.assert_allclose(change, change.mean((1, 2))[:, None, None] + 0 * change, atol=0.3)
    size = np.abs(change.mean((1, 2)))
    assert size.max() <= 51.3 and (size > 1).sum() > 9 and np.unique(size.round(1)).size > 9


def test_a_grey_preset_has_views_of_masks(make, images):
    """No flips: nothing is moved, and nothing is moved back."""
    found = make(Columns(), fill_preset({"preset": "xray"}), views=3, masks=True)({}, images)
    assert np.abs(found[..., 0] - images[..., 0]).max() > 1
    np.testing.assert_array_equal(found[..., 1], np.broadcast_to(np.arange(8), (13, 8, 8)))


def test_randaugment_of_masks_draws_among_what_is_left(make, images):
    augment = {"rotate": 20.0, "shear": 5.0, "brightness": 0.1, "randaugment": 3}
    settings = {"randaugment_strength": 2.0}
    found = make(Columns(), {**augment, **settings}, views=2, masks=True)({}, images // 4 + 80)
    same = make(Columns(), {"brightness": 0.2}, views=2, masks=True)({}, images // 4 + 80)
    np.testing.assert_allclose(found, same, atol=0.1)


def test_what_is_made_of_the_means_is_returned(make, images):
    predict = make(Columns(), {"flip_horizontal": 1.0}, views=2, masks=True,
                   finish=lambda mean: mean.argmax(-1).astype(np.uint8))  # fmt: skip
    found, plain = predict({}, images), make(Columns(), {"flip_horizontal": 1.0}, masks=True)
    assert found.dtype == np.uint8 and found.shape == (13, 8, 8)
    np.testing.assert_array_equal(found, plain({}, images).argmax(-1))


@pytest.mark.parametrize(("masks", "network"), [(False, Corner()), (True, Columns())])
def test_a_view_depends_on_the_id_and_the_seed_alone(make, images, masks, network):
    augment = {**EVERYTHING, "quarter_turns": 0.75}
    found = make(network, augment, 3, masks=masks)({}, images)
    order = np.random.default_rng(2).permutation(13)[:7]
    for devices, batch_size in ((1, 1), (1, 13), (4, 8)):
        same = make(network, augment, 3, devices, batch_size, ids=IDS[order], masks=masks)
        np.testing.assert_allclose(same({}, images[order]), found[order], rtol=1e-4, atol=1e-3)
    for change in ({"seed": 1}, {"ids": IDS[::-1]}):
        other = make(network, augment, 3, masks=masks, **change)({}, images)
        assert np.abs(other - found).reshape(13, -1).max(1).astype(bool).sum() > 4


def test_views_of_one_image_differ(make, images):
    noisy = {"noise": 0.2}
    first, second, third = (make(Corner(), noisy, views)({}, images) for views in (2, 3, 4))
    plain = images[:, 0, [0, -1], 0].astype(np.float64)
    # What each further view adds to the sum.
    drawn = 2 * first - plain, 3 * second - 2 * first, 4 * third - 3 * second
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(drawn[one] - drawn[other]).max(1) > 1).sum() > 10


def test_streamed_images_give_the_same(make, images):
    predict = make(Corner(), EVERYTHING, 3)
    streamed = Streamed(range(13), lambda row: images[row], images.shape[1:])
    np.testing.assert_array_equal(predict({}, streamed), predict({}, images))


def test_views_of_masks_are_what_can_be_undone():
    augment = {**EVERYTHING, "flip_vertical": 0.25, "mixup": 0.2}
    whole = {"flip_horizontal": 0.5, "flip_vertical": 0.25, "brightness": 0.2, "noise": 0.1}
    assert view_transforms({**augment, "cutout": 0.3, "shift": 0.1}, masks=True) == whole
    on = view_transforms(augment, masks=False)
    assert on.keys() == {*EVERYTHING, "flip_vertical"} and on["rotate"] == 20.0


@pytest.mark.parametrize(
    ("augment", "arguments", "words"),
    [
        ({"rotate": 5.0}, (1, False), "eval.tta=1 would be the image alone"),
        ({}, (3, False), "eval.tta=3 draws views by transforms of the section augment"),
        ({"rotate": 5.0, "cutout": 0.2}, (3, True), "by flips, quarter turns and intensities, all"),
        ({"hue": 0.1, "rotate": 5.0}, (2, False, 1), "change colours (augment.hue), and these"),
    ],
)
def test_views_that_cannot_be_had(augment, arguments, words):
    with pytest.raises(UserError) as refused:
        check_views(augment, *arguments)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_views_that_can_be_had():
    check_views({}, 0, False)
    check_views(fill_preset({"preset": "xray"}), 2, True, 1)
    check_views({"hue": 0.1}, 2, False, 3)
