"""Two domains held against each other, and a target that has labels, some or none."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from image_sets import SPLITS, arrays, folder_set, npz_set, picture
from PIL import Image

from medtl_jax.data.catalog import MISSING, Dataset, DataSpec, Split
from medtl_jax.data.domains import check_domains, has_labels, target_indices, unlabelled
from medtl_jax.data.loader import steps_per_epoch, training_indices
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.streams import Streamed, stream_batches
from medtl_jax.data.unlabelled import read_target, read_unlabelled
from medtl_jax.errors import UserError
from medtl_jax.training.runner import Feed

AB = DataSpec("own", "classify", ("a", "b"))


def split(n: int, seed: int, *, target=None, channels: int = 1, prefix: str = "") -> Split:
    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, channels), dtype=np.uint8)
    target = np.arange(n, dtype=np.int32) % 2 if target is None else target
    return Split(images, target, np.array([f"{prefix}{i}" for i in range(n)]))


def dataset(seed: int, name: str = "own", sizes=(6, 3, 4), task: str = "classify", **options):
    classes = options.pop("classes", ("a", "b"))
    splits = {
        part: split(n, 10 * seed + i, prefix=f"{name}/{part}/", **options)
        for i, (part, n) in enumerate(zip(SPLITS, sizes, strict=True))
    }
    return Dataset(DataSpec(name, task, classes), splits)


def refusal(source: Dataset, target: Dataset) -> str:
    with pytest.raises(UserError) as caught:
        check_domains(source, target)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_split(whole: Dataset, name: str, part: Split) -> Dataset:
    return Dataset(whole.spec, {**whole.splits, name: part})


def streamed(array: np.ndarray, read: list | None = None) -> Streamed:
    def decode(index: int) -> np.ndarray:
        if read is not None:
            read.append(index)
        return array[index]

    return Streamed(range(len(array)), decode, array.shape[1:])


def test_domains_that_fit_stay_as_they_are():
    source, target = dataset(1), dataset(2, "other")
    found = check_domains(source, target)
    assert found.notes == () and found.scored == SPLITS
    for mine, theirs in ((found.source, source), (found.target, target)):
        assert mine.checksum() == theirs.checksum()


def test_classes_in_another_order_are_mapped():
    target = dataset(2, "other", classes=("b", "a"))
    found = check_domains(dataset(1), target)
    assert found.target.spec.classes == ("a", "b")
    # "b" was 0 there and is 1 here.
    np.testing.assert_array_equal(found.target.splits["train"].target, [1, 0, 1, 0, 1, 0])
    assert found.target.splits["train"].target.dtype == np.int32
    assert found.notes == ("the target's classes (b, a) are put into the source's order",)


def test_three_classes_are_mapped_by_name():
    names = ("x", "y", "z")
    labels = np.array([0, 1, 2, 0], np.int32)
    target = dataset(2, "other", (4, 4, 4), classes=("z", "x", "y"), target=labels)
    source = dataset(1, sizes=(4, 4, 4), classes=names, target=labels)
    mapped = check_domains(source, target).target.splits["test"].target
    assert [names[i] for i in mapped] == ["z", "x", "y", "z"]


def test_columns_are_put_into_the_sources_order():
    for task, values in (
        ("multilabel", np.array([[1, 0, MISSING], [0, 0, 1]], np.int8)),
        ("regress", np.array([[1.5, 2.5, np.nan], [4, 5, 6]], np.float32)),
    ):
        options = {"sizes": (2, 2, 2), "task": task, "target": values}
        source = dataset(1, classes=("p", "q", "r"), **options)
        target = dataset(2, "other", classes=("r", "p", "q"), **options)
        mapped = check_domains(source, target).target.splits["train"].target
        np.testing.assert_array_equal(mapped, values[:, [1, 2, 0]])
        assert mapped.dtype == values.dtype


@pytest.mark.parametrize("stream", [False, True])
def test_masks_are_mapped_streamed_ones_when_they_are_read(stream):
    masks = np.random.default_rng(5).integers(0, 2, (6, 4, 4), dtype=np.uint8)
    read: list[int] = []
    held = streamed(masks, read) if stream else masks
    part = dataclasses.replace(split(6, 3), target=held, extra={"mask2": 1 - masks})
    names = ("background", "nucleus")
    source = Dataset(
        DataSpec("own", "segment", names), {"train": dataclasses.replace(split(6, 4), target=masks)}
    )
    target = Dataset(DataSpec("other", "segment", names[::-1]), {"train": part})
    mapped = check_domains(source, target).target.splits["train"]
    assert read == [] and mapped.target.dtype == np.uint8 and len(mapped.target) == 6
    np.testing.assert_array_equal(mapped.target[:], 1 - masks)
    np.testing.assert_array_equal(mapped.extra["mask2"], masks)
    np.testing.assert_array_equal(mapped.target[2], 1 - masks[2])


def test_other_classes_are_refused_with_both_lists():
    message = refusal(dataset(1), dataset(2, "other", classes=("a", "c")))
    assert "own (a, b)" in message and "other (a, c)" in message and "rename" in message
    assert "different names" in refusal(dataset(1), dataset(2, classes=("a", "b", "c")))


def test_ranks_in_another_order_are_refused():
    source = dataset(1, task="ordinal", classes=("mild", "severe"))
    target = dataset(2, "other", task="ordinal", classes=("severe", "mild"))
    assert "different orders" in refusal(source, target)


def test_another_task_is_refused():
    values = np.zeros((2, 2), np.int8)
    target = dataset(2, "other", (2, 2, 2), task="multilabel", target=values)
    assert "task=classify" in (message := refusal(dataset(1), target))
    assert "task=multilabel" in message


def test_a_target_without_training_images_is_refused():
    target = dataset(2, "other")
    assert "no training images" in refusal(dataset(1), with_split(target, "train", split(0, 1)))
    test_alone = Dataset(target.spec, {"test": target.splits["test"]})
    assert "no training images" in refusal(dataset(1), test_alone)


def test_sizes_that_differ_are_a_mistake_of_the_program():
    target = dataset(2, "other")
    images = np.zeros((6, 5, 5, 1), np.uint8)
    part = dataclasses.replace(target.splits["train"], images=images)
    with pytest.raises(ValueError, match="different sizes"):
        check_domains(dataset(1), with_split(target, "train", part))


@pytest.mark.parametrize("grey_target", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_grey_beside_colour_is_repeated_in_three_channels(grey_target, stream):
    grey, colour = dataset(1, "grey"), dataset(2, "colour", channels=3)
    pixels = grey.splits["train"].images
    if stream:
        part = dataclasses.replace(grey.splits["train"], images=streamed(pixels))
        grey = with_split(grey, "train", part)
    pair = (colour, grey) if grey_target else (grey, colour)
    found = check_domains(*pair)
    whose = "target" if grey_target else "source"
    assert found.notes == (f"the {whose}'s images are grey, repeated in three channels",)
    images = getattr(found, whose).splits["train"].images
    assert images.shape == (6, 4, 4, 3) and isinstance(images, Streamed) == stream
    np.testing.assert_array_equal(images[:], np.repeat(pixels, 3, axis=-1))
    np.testing.assert_array_equal(images[[4, 1]], np.repeat(pixels[[4, 1]], 3, axis=-1))


def test_the_source_itself_is_no_target():
    source = dataset(1)
    assert "all training images of the source own are among" in refusal(source, source)
    # Another name, other ids and another order do not hide it, nor do other test images.
    train = source.splits["train"]
    order = np.array([3, 1, 0, 2, 5, 4])
    moved = split(6, 99, prefix="copy")
    moved = dataclasses.replace(moved, images=train.images[order], target=train.target[order])
    target = with_split(dataset(2, "copy"), "train", moved)
    message = refusal(source, target)
    assert "all training images of the source own are among those of the target copy" in message


@pytest.mark.parametrize(
    "draw", [{}, {"per_class": 8}, {"train_fraction": 0.5}], ids=["no val", "per class", "share"]
)
def test_the_source_itself_is_no_target_where_less_of_it_trains(tmp_path, draw):
    made = {name: a for name, a in arrays((4, 4), count=20).items() if not name.startswith("val")}
    config = npz_set(tmp_path, made)
    source = load_dataset(config | draw, 4)
    target = read_target(config, source.spec, 4)
    assert len(source.splits["train"]) < len(target.splits["train"]) == 20
    assert "are among those of the target" in refusal(source, target)


def test_a_tenth_of_the_test_images_may_not_train():
    source, target = dataset(1), dataset(2, "other", (6, 3, 10))
    part = target.splits["train"]
    images = part.images.copy()
    images[4] = target.splits["test"].images[7]
    target = with_split(target, "train", dataclasses.replace(part, images=images))
    message = refusal(source, target)
    assert "1 of 10 test images of the target other are in its training images" in message
    assert "the first is other/test/7 (other/train/4 there): remove them from one" in message


def test_the_few_images_that_are_twice_in_a_published_set_are_noted():
    source, target = dataset(1), dataset(2, "other", (6, 3, 100))
    part = target.splits["test"]
    images = part.images.copy()
    images[7] = target.splits["train"].images[4]
    once = with_split(target, "test", dataclasses.replace(part, images=images))
    assert check_domains(source, once).notes == (
        "1 of 100 test images of the target other are in its training images, the first is "
        "other/test/7 (other/train/4 there)",
    )
    images = images.copy()
    images[8] = target.splits["train"].images[5]
    again = with_split(target, "test", dataclasses.replace(part, images=images))
    assert "2 of 100 test images" in refusal(source, again)


def test_validation_images_of_the_source_that_the_target_trains_on_are_noted():
    source, target = dataset(1), dataset(2, "other")
    part = target.splits["train"]
    images = part.images.copy()
    images[0] = source.splits["val"].images[2]
    found = check_domains(
        source, with_split(target, "train", dataclasses.replace(part, images=images))
    )
    assert found.notes == (
        "1 validation images of the source are in the training images of the target",
    )


def test_images_are_looked_at_once():
    source, target = dataset(1), dataset(2, "other", (6, 3, 10))
    read: list[int] = []
    part, test = source.splits["train"], target.splits["test"]
    leaked = test.images.copy()
    leaked[3] = part.images[5]
    target = with_split(target, "test", dataclasses.replace(test, images=streamed(leaked, read)))

    def drawn(rows):
        chosen = np.array(rows)
        images = streamed(part.images[chosen], read)
        return with_split(source, "train", Split(images, part.target[chosen], part.ids[chosen]))

    seen = {}
    check_domains(drawn([0, 1, 2]), target, seen)
    assert len(read) == 10 + 3
    check_domains(drawn([0, 2, 3]), target, seen)
    assert len(read) == 10 + 4
    # What is known of an image is enough to refuse it.
    with pytest.raises(UserError, match="1 test images of the target other are in the split train"):
        check_domains(drawn([5]), target, seen)
    assert len(read) == 10 + 5
    check_domains(drawn([0]), target)
    assert len(read) == 2 * 10 + 6


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_test_image_that_the_source_learns_or_chooses_by_is_refused(name):
    source, target = dataset(1), dataset(2, "other")
    tested = target.splits["test"]
    images = tested.images.copy()
    images[2] = source.splits[name].images[1]
    message = refusal(
        source, with_split(target, "test", dataclasses.replace(tested, images=images))
    )
    assert f"1 test images of the target other are in the split {name} of the source" in message
    assert "other/test/2" in message and f"own/{name}/1" in message


def test_a_copy_in_colour_is_found_too():
    source, target = dataset(1), dataset(2, "other", channels=3)
    tested = target.splits["test"]
    images = tested.images.copy()
    images[0] = source.splits["train"].images[5]
    changed = with_split(target, "test", dataclasses.replace(tested, images=images))
    assert "1 test images" in refusal(source, changed)


def test_images_that_both_domains_train_on_are_noted():
    source, target = dataset(1), dataset(2, "other")
    part = target.splits["train"]
    images = part.images.copy()
    images[:2] = source.splits["train"].images[:2]
    found = check_domains(
        source, with_split(target, "train", dataclasses.replace(part, images=images))
    )
    assert found.notes == ("2 images are in the training images of both domains",)


def test_empty_scans_are_no_overlap():
    source, target = dataset(1), dataset(2, "other")
    pair = []
    for whole, name in ((source, "train"), (target, "test")):
        part = whole.splits[name]
        images = part.images.copy()
        images[0] = 0
        pair.append(with_split(whole, name, dataclasses.replace(part, images=images)))
    assert check_domains(*pair).notes == ()


def test_what_trains_sees_no_label_of_the_target():
    part = split(6, 3, prefix="train/pneumonia/")
    part = dataclasses.replace(
        part, extra={"mask2": part.target}, patients=np.array(list("aabbcc"))
    )
    bare = unlabelled(part)
    assert bare.images is part.images and len(bare) == 6
    assert bare.target.shape == (6, 0) and not has_labels(bare) and has_labels(part)
    assert bare.extra == {} and not any("pneumonia" in name for name in bare.ids)
    assert len(set(bare.ids.tolist())) == 6
    # No two labellings of the same images can be told apart.
    other = unlabelled(dataclasses.replace(part, target=1 - part.target))
    for field in dataclasses.fields(Split):
        np.testing.assert_array_equal(getattr(bare, field.name), getattr(other, field.name))


def test_a_split_without_labels_feeds_a_training():
    bare = unlabelled(split(5, 3))
    arrays_ = {"image": bare.images, "target": bare.target}
    labelled = {"image": split(8, 4).images, "target": split(8, 4).target}
    feed = Feed({"train": labelled, "source": arrays_})
    rows = feed.indices(0, 0, 3, 4)["source"]
    assert rows.shape == (3, 4) and rows.max() < 5
    batch = next(stream_batches({**arrays_, "image": streamed(bare.images)}, rows))
    assert batch["target"].shape == (4, 0)
    np.testing.assert_array_equal(batch["image"], bare.images[rows[0]])


@pytest.mark.parametrize(("ours", "theirs"), [(6, 600), (600, 6)])
def test_one_domain_may_be_a_hundred_times_larger(ours, theirs):
    found = check_domains(dataset(1, sizes=(ours, 3, 4)), dataset(2, "other", (theirs, 3, 4)))
    assert found.notes == (
        f"an epoch passes once over {ours} source images and {ours / theirs:.3g} times over "
        f"{theirs} target images",
    )
    batch, epochs = 4, 3
    steps = steps_per_epoch(ours, batch) * epochs
    rows = target_indices(0, 0, steps, theirs, batch)
    assert rows.shape == (steps, batch)
    seen = np.bincount(rows.ravel(), minlength=theirs)
    assert seen.max() - seen.min() <= 1, "the target is cycled, no image before another is due"
    assert seen.sum() == steps * batch


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    first=st.integers(0, 30),
    steps=st.integers(1, 8),
    examples=st.integers(1, 40),
    batch=st.integers(1, 9),
)
def test_the_targets_order_is_a_stream_that_any_step_can_be_drawn_from(
    seed, first, steps, examples, batch
):
    whole = target_indices(seed, 0, first + steps, examples, batch)
    np.testing.assert_array_equal(
        target_indices(seed, first, steps, examples, batch), whole[first:]
    )
    full = whole.ravel()[: whole.size // examples * examples].reshape(-1, examples)
    assert (np.sort(full, axis=1) == np.arange(examples)).all()


def test_the_targets_order_is_not_the_sources():
    mine, theirs = training_indices(3, 0, 25, 100, 4), target_indices(3, 0, 25, 100, 4)
    # Of 100 independent pairs of rows one is expected to agree.
    assert (mine == theirs).sum() < 10
    assert (target_indices(4, 0, 25, 100, 4) != theirs).any()


def bare_folder(root, counts=(("train", 3), ("test", 2))):
    value = 100
    for name, count in counts:
        for number in range(count):
            value += 1
            picture(root / name / f"{number}.png", value)
    return {"name": "folder", "dir": str(root)}


def test_a_folder_without_class_folders_has_no_labels(tmp_path):
    (tmp_path / "train").mkdir()
    for name in (".hidden.png", "list.csv"):
        (tmp_path / "train" / name).write_text("x")
    found = read_target(bare_folder(tmp_path), AB, 4)
    assert found.spec.classes == ("a", "b") and found.spec.task == "classify"
    assert {name: part.target.shape for name, part in found.splits.items()} == {
        "train": (3, 0),
        "test": (2, 0),
    }
    train = found.splits["train"]
    assert train.images[:, 0, 0, 0].tolist() == [101, 102, 103]
    assert train.ids.tolist() == ["train/0.png", "train/1.png", "train/2.png"]
    assert found.spec.notes[-1] == "the target has no labels in train and test"
    assert check_domains(dataset(1), found).scored == ()


def test_images_without_splits_are_train(tmp_path):
    picture(tmp_path / "x.png", 7)
    Image.fromarray(np.full((4, 4, 3), (9, 1, 1), np.uint8)).save(tmp_path / "y.png")
    config = {"name": "folder", "dir": str(tmp_path)}
    found = read_target(config, AB, 4)
    assert list(found.splits) == ["train"] and found.splits["train"].images.shape == (2, 4, 4, 3)
    assert found.spec.notes == (
        "the target has no split test",
        "1 of 2 images are grey, repeated in three channels",
        "the target has no labels in train",
    )
    grey = read_target(config, AB, 4, grey=True).splits["train"].images
    assert grey.shape == (2, 4, 4, 1) and grey[0, 0, 0, 0] == 7


def test_labels_of_the_test_split_alone(tmp_path):
    folder_set(tmp_path, (2,), ("b", "a"), ("test",))
    config = bare_folder(tmp_path, [("train", 3)])
    found = read_target(config, AB, 4)
    assert found.splits["train"].target.shape == (3, 0)
    np.testing.assert_array_equal(found.splits["test"].target, [0, 1, 0, 1])
    assert check_domains(dataset(1), found).scored == ("test",)
    # A validation split that is not there cannot be carved from images without labels.
    assert "val" not in read_target(config, AB, 4, splits=SPLITS).splits


def test_a_labelled_folder_needs_no_image_of_every_class(tmp_path):
    folder_set(tmp_path, (4, 2), ("b",), ("train", "test"))
    config = {"name": "folder", "dir": str(tmp_path), "train_fraction": 0.5}
    found = read_target(config, AB, 4)
    assert found.splits["train"].target.tolist() == [1] * 4
    assert "train has no image of a" in found.spec.notes


def test_class_folders_of_other_names_are_refused_with_both_lists(tmp_path):
    folder_set(tmp_path, (1, 1), ("a", "c"), ("train", "test"))
    with pytest.raises(UserError, match=r"own \(a, b\) and of the target .*train \(a, c\)"):
        read_target({"name": "folder", "dir": str(tmp_path)}, AB, 4)


@pytest.mark.parametrize("parts", [("train",), ()])
def test_a_folder_without_images_is_refused(tmp_path, parts):
    for name in parts:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"has no images: add some|no folder .*train"):
        read_target({"name": "folder", "dir": str(tmp_path)}, AB, 4)


def test_many_images_without_labels_stream(tmp_path):
    config = bare_folder(tmp_path) | {"cache_gb": 0.0}
    found = read_target(config, AB, 4).splits["train"].images
    assert isinstance(found, Streamed)
    assert found[:][:, 0, 0, 0].tolist() == [101, 102, 103]


@pytest.mark.parametrize("keys", ["{}_images", "x_{}"])
def test_an_npz_without_labels(tmp_path, keys):
    made = {keys.format(name): array for name, array in _images().items()}
    config = npz_set(tmp_path, made)
    found = read_target(config, AB, 4)
    assert list(found.splits) == ["train", "test"]
    assert all(not has_labels(part) for part in found.splits.values())
    np.testing.assert_array_equal(found.splits["train"].images[..., 0], _images()["train"])
    assert found.splits["test"].ids[1] == "test/000001"


def _images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.integers(0, 256, (5, 4, 4), dtype=np.uint8) for name in SPLITS}


def test_an_npz_with_labels_of_the_test_split_alone(tmp_path):
    made = arrays((4, 4))
    config = npz_set(tmp_path, {k: v for k, v in made.items() if k != "train_labels"})
    found = read_target(config, AB, 4)
    assert found.splits["train"].target.shape == (6, 0)
    np.testing.assert_array_equal(found.splits["test"].target, made["test_labels"][:, 0])
    assert found.spec.notes == (
        "the target's labels are numbers, taken as the source's classes: 0 is a, 1 is b",
        "the target has no labels in train",
    )


def test_floats_of_an_npz_without_labels_are_scaled(tmp_path):
    config = npz_set(tmp_path, {"train_images": _images()["train"] / 255})
    splits, _ = read_unlabelled(config, 4)
    np.testing.assert_array_equal(splits["train"].images[..., 0], _images()["train"])


def test_an_npz_in_its_own_order_of_classes(tmp_path):
    made = arrays((4, 4))
    found = read_target(npz_set(tmp_path, made) | {"classes": "b,a"}, AB, 4)
    mapped = check_domains(dataset(1), found).target
    np.testing.assert_array_equal(mapped.splits["test"].target, 1 - made["test_labels"][:, 0])


def test_a_labelled_target_is_read_as_the_data_are(tmp_path):
    config = npz_set(tmp_path, arrays((4, 4)))
    numbers = dataclasses.replace(AB, classes=("0", "1"))
    found, plain = read_target(config, numbers, 4), load_dataset(config, 4)
    assert found.spec.notes == plain.spec.notes
    for name in ("train", "test"):
        np.testing.assert_array_equal(found.splits[name].target, plain.splits[name].target)
        np.testing.assert_array_equal(found.splits[name].images, plain.splits[name].images)


def test_a_phantom_target_keeps_its_own_classes():
    config = {"name": "phantom", "phantom": {"train": 6, "val": 6, "test": 6, "domain": "b"}}
    own = load_dataset(config, 32)
    found = read_target(config, own.spec, 32)
    assert found.splits["train"].target.tolist() == own.splits["train"].target.tolist()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"train_images": np.zeros((0, 4, 4), np.uint8)}, "train_images is empty"),
        ({"train_images": np.zeros((2, 4), np.uint8)}, "has shape"),
        ({"train_images": np.array([None, 1])}, "never unpickled"),
        ({"train_images": np.full((2, 4, 4), 300.0)}, "floats from 300"),
        ({"test_images": np.zeros((2, 4, 4), np.uint8)}, "lacks train_images"),
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "no array of either layout"),
    ],
)
def test_an_npz_that_cannot_be_used(tmp_path, made, words):
    with pytest.raises(UserError, match=words) as caught:
        read_target(npz_set(tmp_path, made), AB, 4)
    assert "\n" not in str(caught.value)


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match=r"is not a readable \.npz file"):
        read_target({"name": "npz", "dir": str(tmp_path / "x.npz")}, AB, 4)
    with pytest.raises(UserError, match="no such file"):
        read_target({"name": "npz", "dir": str(tmp_path / "y.npz")}, AB, 4)


def test_an_npz_that_declares_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("medtl_jax.data.unlabelled.MAX_NPZ_BYTES", 79)
    config = npz_set(tmp_path, {"train_images": _images()["train"]})
    with pytest.raises(UserError, match="more than the limit"):
        read_target(config, AB, 4)


def test_other_sets_have_labels():
    with pytest.raises(UserError, match=r"read from a folder or an \.npz"):
        read_unlabelled({"name": "csv", "dir": "list.csv"}, 4)


def test_digits_are_two_domains(shared):
    folder = shared / "data" / "digits"
    source = load_dataset({"name": "npz", "dir": str(folder / "usps.npz")}, 28)
    target = read_target({"name": "npz", "dir": str(folder / "mnist.npz")}, source.spec, 28)
    found = check_domains(source, target)
    assert found.scored == ("train", "test") and found.target.spec.classes == source.spec.classes
