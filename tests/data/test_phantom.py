"""The phantom: deterministic, balanced, self-consistent, and not solvable by brightness."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_jax.data import phantom
from medtl_jax.errors import UserError

COUNTS = {"train": 26, "val": 9, "test": 13}


@pytest.fixture(scope="module")
def small():
    return phantom.make_phantom(64, **COUNTS)


@pytest.fixture(scope="module")
def other_scanner():
    return phantom.make_phantom(64, **COUNTS, domain="b")


def assert_equal_splits(a, b, n=None):
    for name in ("images", "target", "ids", "patients"):
        np.testing.assert_array_equal(getattr(a, name)[:n], getattr(b, name)[:n])
    for name in ("mask", "size", "boxes", "domain"):
        np.testing.assert_array_equal(a.extra[name][:n], b.extra[name][:n])


def test_what_comes_back(small):
    assert small.spec.name == "phantom"
    assert small.spec.task == "classify"
    assert small.spec.licence == "Apache-2.0 (generated)"
    assert len(small.spec.classes) == 4
    assert set(small.splits) == set(COUNTS)
    for name, split in small.splits.items():
        n = COUNTS[name]
        assert split.images.shape == (n, 64, 64, 1)
        assert split.images.dtype == np.uint8
        assert split.target.shape == (n,)
        assert split.target.dtype == np.int32
        assert split.ids[1] == f"phantom-{name}-00001"
        types = {"mask": np.uint8, "size": np.float32, "boxes": np.float32, "domain": np.int32}
        shapes = {"mask": (n, 64, 64), "size": (n,), "boxes": (n, 4), "domain": (n,)}
        assert {k: v.dtype.type for k, v in split.extra.items()} == types
        assert {k: v.shape for k, v in split.extra.items()} == shapes
    ids = np.concatenate([split.ids for split in small.splits.values()])
    assert len(set(ids)) == sum(COUNTS.values())


def test_same_arguments_give_the_same_bytes(small):
    again = phantom.make_phantom(64, **COUNTS)
    assert again.checksum() == small.checksum()
    for name, split in small.splits.items():
        assert_equal_splits(split, again.splits[name])


def test_a_slice_does_not_depend_on_how_many_are_made(small):
    fewer = phantom.make_phantom(64, train=7, val=4, test=5)
    for name, split in fewer.splits.items():
        assert_equal_splits(split, small.splits[name], len(split))


def test_every_slice_is_different(small):
    images = np.concatenate([split.images for split in small.splits.values()])
    assert len({image.tobytes() for image in images}) == sum(COUNTS.values())


def test_another_seed_gives_other_slices(small):
    other = phantom.make_phantom(64, **COUNTS, seed=1)
    for name, split in small.splits.items():
        same = (split.images == other.splits[name].images).all((1, 2, 3))
        assert not same.any()
    assert not np.array_equal(small.splits["train"].target, other.splits["train"].target)


def test_classes_are_balanced_in_every_run_of_four(small):
    for split in small.splits.values():
        counts = np.bincount(split.target, minlength=4)
        assert counts.max() - counts.min() <= 1
        whole = len(split) // 4 * 4
        runs = np.sort(split.target[:whole].reshape(-1, 4), axis=1)
        np.testing.assert_array_equal(runs, np.tile(np.arange(4), (whole // 4, 1)))
    # A fixed order would tell the label from the place in the file.
    assert (
        len({tuple(split.target[i : i + 4]) for split in small.splits.values() for i in (0, 4)}) > 1
    )


def test_patients_have_one_to_three_slices_and_one_split(small):
    patients = {name: set(split.patients) for name, split in small.splits.items()}
    assert not patients["train"] & patients["val"]
    assert not patients["train"] & patients["test"]
    assert not patients["val"] & patients["test"]
    slices = np.concatenate(
        [np.unique(s.patients, return_counts=True)[1] for s in small.splits.values()]
    )
    assert set(slices) == {1, 2, 3}


def test_slices_of_one_patient_look_alike():
    split = phantom.make_phantom(64, train=60, val=4, test=4).splits["train"]
    pixels = split.images.reshape(60, -1).astype(np.float64)
    closeness = np.corrcoef(pixels)
    together = split.patients[:, None] == split.patients
    np.fill_diagonal(together, False)
    assert together.sum() > 10
    apart = ~together & ~np.eye(60, dtype=bool)
    assert closeness[together].mean() > closeness[apart].mean() + 0.02


def test_mask_size_and_box_agree(small):
    for split in small.splits.values():
        mask, size, boxes = (split.extra[k] for k in ("mask", "size", "boxes"))
        assert set(np.unique(mask)) == {0, 1}
        pixel_mm = 256.0 / 64
        np.testing.assert_array_equal(size, mask.sum((1, 2)) * pixel_mm**2)
        for label, one, (y0, x0, y1, x1) in zip(split.target, mask, boxes, strict=True):
            if small.spec.classes[label] == "normal":
                assert one.sum() == 0
                assert (y0, x0, y1, x1) == (0, 0, 0, 0)
                continue
            ys, xs = np.nonzero(one)
            assert (y0, x0, y1, x1) == (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1)
            # A radius of 0.14 to 0.21 of half the field of view is 18 to 27 mm.
            assert 500 < one.sum() * pixel_mm**2 < 5000


def test_lesions_lie_on_the_body_and_stand_out(small):
    split = small.splits["train"]
    for image, mask, label in zip(
        split.images[..., 0], split.extra["mask"], split.target, strict=True
    ):
        background = image[:6, :6].mean()
        if label:
            assert image[mask == 1].mean() > background + 20


def test_domains_show_the_same_anatomy_under_another_scanner(small, other_scanner):
    for name, a in small.splits.items():
        b = other_scanner.splits[name]
        for key in ("mask", "size", "boxes"):
            np.testing.assert_array_equal(a.extra[key], b.extra[key])
        for key in ("target", "ids", "patients"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
        assert not (a.images == b.images).all((1, 2, 3)).any()
        for one, two in zip(a.images, b.images, strict=True):
            assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.8
        assert (a.extra["domain"] == 0).all()
        assert (b.extra["domain"] == 1).all()


def test_the_noise_of_scanner_a_is_white_and_of_b_correlated():
    def neighbour_correlation(domain):
        split = phantom.make_phantom(128, train=12, val=4, test=4, domain=domain).splits["train"]
        corner = split.images[:, :12, :12, 0].astype(np.float64)
        corner -= corner.mean((1, 2), keepdims=True)
        return (corner[:, :, 1:] * corner[:, :, :-1]).mean() / (corner**2).mean()

    assert abs(neighbour_correlation("a")) < 0.15
    assert neighbour_correlation("b") > 0.3


def test_mixed_sends_each_patient_to_one_of_the_scanners(small, other_scanner):
    mixed = phantom.make_phantom(64, **COUNTS, domain="mixed")
    for name, split in mixed.splits.items():
        domain = split.extra["domain"]
        for patient in np.unique(split.patients):
            assert len(set(domain[split.patients == patient])) == 1
        expected = np.where(
            domain[:, None, None, None] == 0,
            small.splits[name].images,
            other_scanner.splits[name].images,
        )
        np.testing.assert_array_equal(split.images, expected)
    assert set(mixed.splits["train"].extra["domain"]) == {0, 1}


def test_a_smaller_image_is_the_block_mean_of_the_larger():
    large = phantom.make_phantom(128, train=12, val=4, test=4).splits["train"]
    for size in (32, 64):
        split = phantom.make_phantom(size, train=12, val=4, test=4).splits["train"]
        k = 128 // size
        mean = large.images[..., 0].reshape(12, size, k, size, k).mean((2, 4))
        # Both round to whole grey values, and the mean of rounded values is off by half at most.
        assert np.abs(split.images[..., 0] - mean).max() <= 1.0
        np.testing.assert_array_equal(split.target, large.target)


@pytest.mark.parametrize("size", [48, 100, 224])
def test_other_sizes_show_the_same_lesions(size):
    a = phantom.make_phantom(128, train=8, val=4, test=4).splits["train"]
    b = phantom.make_phantom(size, train=8, val=4, test=4).splits["train"]
    assert b.images.shape == (8, size, size, 1)
    np.testing.assert_array_equal(a.target, b.target)
    np.testing.assert_allclose(b.extra["size"], a.extra["size"], rtol=0.15)
    a_boxes, b_boxes = a.extra["boxes"] / 128, b.extra["boxes"] / size
    np.testing.assert_allclose(b_boxes, a_boxes, atol=3 / min(size, 128))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 31}, "image_size is 31; give a whole number from 32 to 512"),
        ({"image_size": 513}, "image_size is 513"),
        ({"image_size": 64.0}, "image_size is 64.0"),
        ({"image_size": True}, "image_size is True"),
        ({"train": 3}, "train count is 3; give a whole number of at least 4"),
        ({"val": 0}, "val count is 0"),
        ({"test": -1}, "test count is -1"),
        ({"domain": "c"}, "domain 'c' is unknown; use one of a, b, mixed"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
    ],
)
def test_a_bad_argument_is_one_clear_line(arguments, message):
    with pytest.raises(UserError) as caught:
        phantom.make_phantom(**{"image_size": 64, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_brightness_and_place_do_not_tell_the_classes():
    splits = phantom.make_phantom(64, train=900, val=4, test=400).splits

    def accuracy(features):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        model.fit(features(splits["train"].images), splits["train"].target)
        return model.score(features(splits["test"].images), splits["test"].target)

    def pixels(images):
        return images.reshape(-1, 16, 4, 16, 4).mean((2, 4)).reshape(len(images), -1)

    def histogram(images):
        return np.stack([np.bincount(i.ravel() // 8, minlength=32) for i in images])

    assert accuracy(pixels) < 0.45
    assert accuracy(histogram) < 0.45
