"""What the audit finds of leaks whose number is known, and what it does not take for one."""

import csv
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import SPLITS, csv_set, folder_set, refusal
from PIL import Image
from scipy.ndimage import gaussian_filter

from experiments.planted_leaks import EDITS
from experiments.planted_leaks import main as plant_and_count
from medtl_jax.commands import run_tool
from medtl_jax.data import duplicates
from medtl_jax.data.__main__ import main
from medtl_jax.data.audit import audit_dataset, highest_share
from medtl_jax.data.catalog import MISSING, Dataset, DataSpec, Split
from medtl_jax.data.fingerprints import take_prints
from medtl_jax.data.images import Progress
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.registration import fit_crops
from medtl_jax.data.streams import Streamed

SIZE = 64


def pictures(count, seed=0, size=SIZE):
    """Grey images `[n, s, s]` of smooth blobs that share their outline, as chests do."""
    rng = np.random.default_rng(seed)
    fine = gaussian_filter(rng.standard_normal((count, size, size)), (0, 1.5, 1.5))
    coarse = gaussian_filter(rng.standard_normal((count, size, size)), (0, 6, 6))
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    outline = 90 * np.exp(-6 * (rows**2 + 2 * columns**2))
    values = 60 + outline + 90 * fine + 300 * coarse
    return np.clip(values, 0, 255).astype(np.uint8)


def resized(image, size=SIZE):
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def dataset(images, task="classify", targets=None, classes=("a", "b"), stream=False):
    """The set of images `{split: [n, s, s]}` or with channels."""
    splits = {}
    for name, part in images.items():
        part = part if part.ndim == 4 else part[..., None]
        target = np.arange(len(part), dtype=np.int32) % 2 if targets is None else targets[name]
        rows = Streamed(range(len(part)), part.__getitem__, part.shape[1:]) if stream else part
        ids = np.array([f"{name}/{row:03}" for row in range(len(part))])
        splits[name] = Split(rows, target, ids)
    return Dataset(DataSpec("made", task, classes), splits)


def sides(audit):
    return {(pair["first"][1], pair["second"][1]) for pair in audit["pairs"]}


@pytest.fixture(scope="module")
def clean():
    return dict(zip(SPLITS, np.split(pictures(120), [70, 90]), strict=True))


def test_images_that_share_their_outline_alone_are_no_copies(clean):
    audit = audit_dataset(dataset(clean))
    assert audit["pairs"] == [] and audit["conflicts"] == 0
    assert audit["findings"] == []
    assert audit["images"] == {"train": 70, "val": 20, "test": 30}
    assert highest_share(audit)[1] == 0


@pytest.mark.parametrize("kind", ["same file", *EDITS])
@pytest.mark.parametrize("stream", [False, True])
def test_each_kind_of_copy_is_found(clean, kind, stream):
    rng = np.random.default_rng(1)
    edit = EDITS.get(kind, lambda image, rng: image)
    copies = np.stack([resized(np.ascontiguousarray(edit(im, rng))) for im in clean["test"][:10]])
    images = {**clean, "train": np.concatenate([clean["train"], copies])}
    audit = audit_dataset(dataset(images, stream=stream))
    assert sides(audit) == {(f"train/{70 + row:03}", f"test/{row:03}") for row in range(10)}
    equal = kind in ("same file", "saved anew")
    assert audit["copied"]["test"] == {
        "exact": 10 if equal else 0,
        "near": 0 if equal else 10,
        "share": pytest.approx(1 / 3, abs=1e-6),
    }
    assert {pair["mirrored"] for pair in audit["pairs"]} == {kind in ("mirrored", "all of these")}
    assert all(pair["conflict"] is False for pair in audit["pairs"])


def test_a_copy_that_is_the_whole_of_a_cropped_image_is_found(clean):
    # The crop stands in the later split, and the whole image in train.
    parts = np.stack([resized(image[6:, :58]) for image in clean["train"][:5]])
    audit = audit_dataset(dataset({**clean, "val": np.concatenate([clean["val"], parts])}))
    assert sides(audit) == {(f"train/{row:03}", f"val/{20 + row:03}") for row in range(5)}
    for pair in audit["pairs"]:
        np.testing.assert_allclose(pair["crop"], [6 / 64, 0, 0, 6 / 64], atol=0.012)


@settings(max_examples=15)
@given(st.tuples(*[st.integers(0, 9)] * 4), st.floats(0.6, 1.4), st.integers(0, 50))
def test_the_crop_is_measured(cut, gain, seed):
    image = pictures(1, seed, 96)[0]
    top, bottom, left, right = cut
    part = resized(image[top : 96 - bottom, left : 96 - right], 96)
    start = np.round(np.array([cut], np.float32) / 96 / 0.05) * 0.05
    wholes, parts = image[None].astype(np.float32), gain * part[None].astype(np.float32)
    crops, fits = fit_crops(wholes, parts, start.astype(np.float32))
    np.testing.assert_allclose(crops[0] * 96, cut, atol=0.8)
    assert fits[0] > 0.97


def test_colour_channels_count_for_equal_pixels():
    grey = pictures(4)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    other = colour.copy()
    other[..., 0] //= 2
    audit = audit_dataset(dataset({"train": colour, "test": other}))
    assert audit["copied"]["test"]["exact"] == 0
    assert audit["copied"]["test"]["near"] == 4


def test_images_of_one_shade_are_named_and_are_no_copies(clean):
    flat = np.full((3, SIZE, SIZE), 7, np.uint8)
    images = {**clean, "train": np.concatenate([clean["train"], flat]), "test": flat}
    audit = audit_dataset(dataset(images))
    assert audit["pairs"] == []
    assert audit["constant"] == [
        *(f"train/{k:03}" for k in (70, 71, 72)),
        *(f"test/{k:03}" for k in range(3)),
    ]
    assert any("6 images have one shade alone, first: train/070" in x for x in audit["findings"])


def labelled(task, first, second, classes=("a", "b")):
    """The audit of one image, twice in train and once in val, with these labels."""
    images = pictures(3)
    targets = {"train": np.array([first, first]), "val": np.array([second])}
    parts = {"train": images[:2], "val": images[:1]}
    return audit_dataset(dataset(parts, task, targets, classes))


@pytest.mark.parametrize(
    ("task", "first", "second", "conflicts"),
    [
        ("classify", 0, 0, 0),
        ("classify", 0, 1, 1),
        ("ordinal", 1, 0, 1),
        ("multilabel", [1, 0], [1, MISSING], 0),
        ("multilabel", [1, 0], [0, MISSING], 1),
        ("regress", [1.5, np.nan], [1.5, 3.0], 0),
        ("regress", [1.5, np.nan], [1.6, 3.0], 1),
    ],
)
def test_labels_of_copies_that_differ(task, first, second, conflicts):
    audit = labelled(task, first, second)
    assert audit["conflicts"] == conflicts
    assert [pair["conflict"] for pair in audit["pairs"]] == [bool(conflicts)]
    assert any("different labels" in line for line in audit["findings"]) == bool(conflicts)


def test_masks_that_differ_are_a_conflict_of_equal_pixels_alone():
    mask = np.zeros((SIZE, SIZE), np.uint8)
    assert labelled("segment", mask, mask)["conflicts"] == 0
    assert labelled("segment", mask, mask + 1)["conflicts"] == 1
    images = pictures(1)
    masks = {"train": mask[None], "val": mask[None] + 1}
    parts = {"train": images, "val": images[:, :, ::-1]}
    audit = audit_dataset(dataset(parts, "segment", masks))
    assert (len(audit["pairs"]), audit["conflicts"]) == (1, 0)


def test_repeats_within_a_split_are_counted_apart(clean):
    images = {**clean, "train": np.concatenate([clean["train"], clean["train"][:4]])}
    audit = audit_dataset(dataset(images))
    assert audit["repeated"] == {"train": 4, "val": 0, "test": 0}
    assert highest_share(audit) == ("val", 0.0)
    assert audit["findings"] == ["4 images of train repeat the pixels of another one there"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: images // 16 + 100, "the pixels span 10"),
        (lambda images: np.where(images > 190, 250, images // 20).astype(np.uint8), "nearly black"),
    ],
)
def test_values_that_the_weights_do_not_expect(clean, change, words):
    assert not any("data.window" in line for line in audit_dataset(dataset(clean))["findings"])
    findings = audit_dataset(dataset({k: change(v) for k, v in clean.items()}))["findings"]
    (line,) = [line for line in findings if "data.window" in line]
    assert words in line


def test_borders_by_class(clean):
    images = {name: part.copy() for name, part in clean.items()}
    for part in images.values():
        part[1::2, :, :5] = 255  # The class b; 5 of 64 pixels are 7.8%.
        part[::2, :2] = 0  # 2 are 3.1%.
    (finding,) = audit_dataset(dataset(images))["findings"]
    assert finding.startswith("50% of the images have a border of one shade wider than 5%")
    assert "by class a 0%, b 100%" in finding
    images = {name: part[1::2] for name, part in images.items()}
    audit = audit_dataset(dataset(images))
    assert audit["findings"] == [] and audit["notes"][-1].startswith("100% of the images have a")


def test_the_width_of_borders():
    images = pictures(2)
    images[0, :2] = 0
    images[1, :, -5:] = 255
    assert take_prints(images[..., None]).borders.tolist() == [2 / 64, 5 / 64]


def test_of_too_many_pairs_cropped_copies_are_not_searched_for(clean, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS_CROPPED", 10)
    copies = np.stack([resized(clean["test"][0][6:, 6:]), clean["test"][1][:, ::-1]])
    audit = audit_dataset(dataset({**clean, "train": np.concatenate([clean["train"], copies])}))
    assert ("train/071", "test/001") in sides(audit)
    assert any("cropped copies were not searched for" in note for note in audit["notes"])


def test_an_audit_is_json_and_reports_progress(clean):
    seen: list[tuple[int, int]] = []
    report: Progress = lambda done, total, text: seen.append((done, total))  # noqa: E731
    audit = audit_dataset(dataset(clean), report)
    assert json.loads(json.dumps(audit, allow_nan=False)) == audit
    assert seen and all(0 < done <= total for done, total in seen)


@pytest.mark.parametrize("size", [1, 2, 8, 28])
def test_small_images_are_audited(size):
    rng = np.random.default_rng(0)
    parts = {name: rng.integers(0, 256, (3, size, size, 1), dtype=np.uint8) for name in SPLITS}
    audit = audit_dataset(dataset(parts))
    assert audit["images"] == {"train": 3, "val": 3, "test": 3}


# Patients by the names of the files.


def named_set(root, names):
    """A folder of one class pair; `names` are (split, file name)."""
    rng = np.random.default_rng(0)
    for number, (split, name) in enumerate(names):
        path = root / split / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return {"name": "folder", "dir": str(root)}


NAMES = [
    (split, f"person{first + number // 2}_view{number}.png")
    for split, first in (("train", 0), ("val", 10), ("test", 20))
    for number in range(4)
]


@pytest.mark.parametrize("pattern", ["person[0-9]+", "(person[0-9]+)_", "^(.*?)_"])
def test_patients_by_the_names_of_files(tmp_path, pattern):
    config = named_set(tmp_path, NAMES) | {"patient_pattern": pattern}
    read = load_dataset(config, 32)
    assert read.splits["train"].patients.tolist() == [f"person{n}" for n in (0, 0, 1, 1)]
    assert audit_dataset(read)["patients"] is True
    config["patient_pattern"] = ""
    assert load_dataset(config, 32).splits["train"].patients is None


def test_a_patient_by_name_in_two_splits_is_refused(tmp_path):
    config = named_set(tmp_path, [*NAMES, ("test", "person1_view9.png"), ("val", "person0_x.png")])
    message = refusal(config | {"patient_pattern": "person[0-9]+"})
    assert "2 patients are in more than one split (first: person0, person1)" in message


@pytest.mark.parametrize(
    ("pattern", "more", "words"),
    [
        ("person([0-9", {}, "no regular expression"),
        ("study[0-9]+", {}, "finds no patient in the name of train/a/person0_view0.png"),
        ("(x)?person", {}, "finds no patient"),
        ("person", {"name": "npz"}, "is for data.name=folder"),
        ("person", {"name": "phantom"}, "is for data.name=folder"),
        ("person", {"name": "csv", "csv_patient_column": "who"}, "csv without"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path, pattern, more, words):
    config = named_set(tmp_path, NAMES) | {"patient_pattern": pattern} | more
    assert words in refusal(config)


def test_a_csv_takes_patients_from_names(tmp_path):
    config = csv_set(tmp_path) | {"patient_pattern": "[0-9]+"}
    assert "patients are in more than one split" in refusal(config)


# The command line.


def test_the_tool_says_that_a_clean_folder_is(tmp_path, capsys):
    named_set(tmp_path, NAMES)
    assert run_tool(main, ["audit", str(tmp_path), "patient_pattern=person[0-9]+"]) == 0
    said = capsys.readouterr().out
    assert "train 4, val 4, test 4" in said and "known, none in two splits" in said
    assert said.endswith("nothing found\n")


def test_the_tool_lists_copies_and_fails_above_the_limit(tmp_path, capsys):
    named_set(tmp_path, NAMES)
    source = tmp_path / "test" / "a" / "person20_view0.png"
    (tmp_path / "train" / "b" / "person20_copy.png").write_bytes(source.read_bytes())
    assert run_tool(main, ["audit", str(tmp_path), "--size=32", "--limit=0.25"]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("copy")]
    assert "train/b/person20_copy.png" in line and "test/a/person20_view0.png" in line
    assert "same pixels" in line and "labels differ" in line
    assert "1 images of test (25.00%) have a copy" in said
    with pytest.raises(SystemExit) as ended:
        run_tool(main, ["audit", str(tmp_path), "--size=32", "--limit=0.2"])
    assert ended.value.code == 1
    assert "above the limit: 25.00% of test, --limit=0.2" in capsys.readouterr().out


def test_the_tool_names_every_patient_of_two_splits(tmp_path, capsys):
    more = [("test", f"person{k}_z.png") for k in (0, 1, 10, 11)]
    named_set(tmp_path, [*NAMES, *more])
    with pytest.raises(SystemExit) as ended:
        run_tool(main, ["audit", str(tmp_path), "patient_pattern=person[0-9]+"])
    assert ended.value.code == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1:5] == ["person0", "person1", "person10", "person11"]


def test_the_tool_takes_csv_and_npz_files(tmp_path, capsys):
    csv_set(tmp_path / "table")
    (table,) = (tmp_path / "table").glob("*.csv")
    assert run_tool(main, ["audit", str(table), "--size=16"]) == 0
    images = pictures(12, size=28)
    parts = {name: images[4 * k : 4 * k + 4] for k, name in enumerate(SPLITS)}
    labels = np.array([[0], [1], [0], [1]], np.uint8)
    arrays = {f"{k}_images": v for k, v in parts.items()} | {f"{k}_labels": labels for k in SPLITS}
    np.savez(tmp_path / "set.npz", **arrays)
    capsys.readouterr()
    assert run_tool(main, ["audit", str(tmp_path / "set.npz"), "--size=28"]) == 0
    assert "nothing found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["audit", "nowhere"], "no such folder"),
        (["audit"], "required"),
        (["audit", ".", "--limit=2"], "--limit=2 must be from 0 to 1"),
        (["audit", "unknown=1"], "is no KEY=VALUE"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert run_tool(main, arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_broken_file_is_one_line(tmp_path, capsys):
    folder_set(tmp_path)
    (tmp_path / "val" / "cyst" / "broken.png").write_bytes(b"no picture")
    assert run_tool(main, ["audit", str(tmp_path)]) == 2
    assert "cannot be read, first:" in capsys.readouterr().err


SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
KERMANY = SHARED / "data" / "chest_xray_kermany224"


@pytest.mark.slow
@pytest.mark.skipif(not KERMANY.is_dir(), reason="../shared/data/chest_xray_kermany224 is absent")
def test_leaks_in_real_x_rays(capsys):
    patients = "^((?:NORMAL2-)?IM-[0-9]+|person[0-9]+)"
    plant_and_count([str(KERMANY), "--count=60", "--seed=2", f"--patients={patients}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit")]
    shares = {line[8:22].strip(): eval(line[22:].split()[0]) for line in lines if "=" in line}
    assert len(shares) == 9
    assert shares.pop("false alarms") <= 0.01
    assert min(shares.values()) >= 0.95, shares


@pytest.mark.skipif(not KERMANY.is_dir(), reason="../shared/data/chest_xray_kermany224 is absent")
def test_the_pattern_finds_the_patients_of_the_x_rays():
    pattern = "^((?:NORMAL2-)?IM-[0-9]+|person[0-9]+)"
    config = {"name": "folder", "dir": str(KERMANY), "patient_pattern": pattern}
    from medtl_jax.data.listing import list_folder, name_patients, patient_pattern

    entries, _ = list_folder(KERMANY, SPLITS)
    found = {e.id: e.patient for e in name_patients(entries, patient_pattern(config), KERMANY)}
    with open(KERMANY / "labels.csv", newline="") as file:
        known = {row["path"]: row["patient"] for row in csv.DictReader(file)}
    assert found == {name: known[name] for name in found}
