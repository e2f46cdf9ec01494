"""NIfTI volumes: orientation and values against nibabel's, masks, and clear refusals."""

import gzip
import itertools
import struct
import sys

import nibabel
import numpy as np
import pytest
from PIL import Image

from medtl_jax.data import nifti
from medtl_jax.data.images import decode_many
from medtl_jax.data.masks import decode_mask
from medtl_jax.data.medical import Reading, find_images
from medtl_jax.data.prediction import original_sizes, read_images_for_prediction
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

SHAPE = (4, 5, 6)
# From left to right, posterior to anterior and inferior to superior, every voxel another value.
VOLUME = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
# As a radiologist sees them: the patient's right on the left, anterior or superior at the top;
# from the side anterior on the left.
SEEN = {
    "axial": lambda k: VOLUME[::-1, ::-1, k].T,
    "coronal": lambda k: VOLUME[::-1, k, ::-1].T,
    "sagittal": lambda k: VOLUME[k, ::-1, ::-1].T,
}
_AXIAL = Reading()


def oblique(degrees=20.0):
    """An affine of 2 x 1 x 3 mm voxels whose axes lean by so much."""
    turn = np.radians(degrees)
    rotation = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([2.0, 1.0, 3.0])
    affine[:3, 3] = (10, -20, 30)
    return affine


def save(path, volume=VOLUME, affine=None, stored="RAS", kind=nibabel.Nifti1Image):
    """Writes the volume, its axes stored in the order and direction that `stored` names."""
    image = kind(volume, oblique() if affine is None else affine)
    if stored != "RAS":
        codes = nibabel.orientations.axcodes2ornt(tuple(stored))
        image = image.as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.orientations.axcodes2ornt(("R", "A", "S")), codes
            )
        )
    nibabel.save(image, path)
    return path


def planes(path, reading=_AXIAL):
    (found,) = find_images([(path, path.name)], reading)
    return found


def refusal(path, reading=_AXIAL):
    with pytest.raises(UserError) as caught:
        decode_many([image.source for image in planes(path, reading)], 4)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


STORED = ["".join(axes) for axes in itertools.product("RL", "AP", "SI")]
STORED += ["ASR", "SPL", "PIR", "ILA"]


@pytest.mark.parametrize("stored", STORED)
def test_slices_however_they_are_stored(tmp_path, stored):
    path = save(tmp_path / "v.nii", stored=stored)
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    assert (canonical.get_fdata() == VOLUME).all()
    layout = nifti.read_layout(path)
    np.testing.assert_allclose(layout.affine, canonical.affine, atol=1e-4)
    window = (128.0, 256.0)
    for plane, seen in SEEN.items():
        found = planes(path, Reading(window=window, plane=plane))
        assert len(found) == SHAPE[nifti.PLANES[plane]]
        for k, image in enumerate(found):
            assert image.id == f"v.nii#{k}" and image.patient == "v.nii"
            assert (image.source.labels() == seen(k)).all()
            values = image.source.read().values
            assert values.shape[::-1] == image.source.size
            np.testing.assert_allclose(values, seen(k) * (255 / 256), atol=1e-4)


def test_files_of_both_versions_packed_or_not(tmp_path):
    kinds = {"a.nii": nibabel.Nifti1Image, "b.nii.gz": nibabel.Nifti1Image}
    kinds |= {"c.nii": nibabel.Nifti2Image, "D.NII.GZ": nibabel.Nifti2Image}
    for name, kind in kinds.items():
        save(tmp_path / name, kind=kind)
    images, ids, notes = read_images_for_prediction(tmp_path, 8)
    assert ids.tolist() == [f"{name}#{k}" for name in sorted(kinds) for k in range(6)]
    first = images[:6]
    assert all((images[6 * n : 6 * n + 6] == first).all() for n in range(4))
    assert notes == (
        "24 of 24 images: NIfTI without a window, 0.5 to 99.5 per cent of each volume's values "
        "mapped to 0..255",
    )
    assert original_sizes(tmp_path, ["D.NII.GZ#2"], Reading(plane="sagittal")) == [(5, 6)]


def test_slope_window_and_percentiles_of_the_whole_volume(tmp_path):
    path = save(tmp_path / "v.nii")
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<2f", 2.0, -100.0)  # scl_slope, scl_inter
    path.write_bytes(content)
    assert nibabel.load(tmp_path / "v.nii").dataobj.slope == 2.0
    real = VOLUME * 2.0 - 100
    seen = SEEN["axial"](3) * 2.0 - 100
    values = planes(tmp_path / "v.nii", Reading(window=(0.0, 100.0)))[3].source.read().values
    np.testing.assert_allclose(values, np.clip((seen + 50) / 100 * 255, 0, 255), atol=1e-4)
    low, high = np.percentile(real, (0.5, 99.5))
    values = planes(tmp_path / "v.nii")[3].source.read().values
    np.testing.assert_allclose(
        values, np.clip((seen - low) / (high - low) * 255, 0, 255), atol=1e-3
    )


def test_floats_with_values_that_are_no_numbers(tmp_path):
    volume = VOLUME.astype(np.float32)
    volume[0, 0, 0] = np.nan
    volume[0, 0, 1] = np.inf
    path = save(tmp_path / "v.nii", volume)
    low, high = np.percentile(volume[np.isfinite(volume)], (0.5, 99.5))
    values = planes(path)[0].source.read().values
    assert values[-1, -1] == 0 and values.max() <= 255
    np.testing.assert_allclose(
        values[0, 0], np.clip((volume[3, 4, 0] - low) / (high - low), 0, 1) * 255, atol=1e-3
    )
    nothing = save(tmp_path / "n.nii", np.full(SHAPE, np.nan, np.float32))
    assert "none of its values is a finite number" in refusal(nothing)


def test_neighbouring_slices_are_channels(tmp_path):
    path = save(tmp_path / "v.nii", stored="LPI")
    reading = Reading(window=(128.0, 256.0), slices=3)
    images, ids, _ = read_images_for_prediction(path, 16, reading=reading)
    alone, same, _ = read_images_for_prediction(path, 16, reading=Reading(window=(128.0, 256.0)))
    assert ids.tolist() == same.tolist() and images.shape == (6, 16, 16, 3)
    for k in range(6):
        for channel, neighbour in enumerate((max(k - 1, 0), k, min(k + 1, 5))):
            assert (images[k, ..., channel] == alone[neighbour, ..., 0]).all()
    (chosen,) = find_images([(tmp_path / "v.nii#0", "v.nii#0")], reading)[0]
    assert (decode_many([chosen.source], 16, channels=3)[0][0] == images[0]).all()


def test_planes_without_a_third_axis(tmp_path):
    flat = save(tmp_path / "flat.nii", VOLUME[:, :, 0], np.eye(4))
    (image,) = planes(flat)
    assert image.id == "flat.nii" and (image.source.labels() == SEEN["axial"](0)).all()
    deep = save(tmp_path / "deep.nii", VOLUME[..., None])
    assert (planes(deep)[2].source.labels() == SEEN["axial"](2)).all()


def test_a_file_that_says_no_orientation(tmp_path):
    image = nibabel.Nifti1Image(VOLUME, None)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 0
    nibabel.save(image, tmp_path / "v.nii")
    (found, *_) = planes(tmp_path / "v.nii")
    assert "orientation not said and taken as left" in found.source.read().how
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "v.nii")).get_fdata()
    assert (found.source.labels() == canonical[::-1, ::-1, 0].T).all()


def csv_of(root, rows, header="path,split,label"):
    (root / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    return {"name": "csv", "dir": str(root / "list.csv")}


def test_a_volume_is_one_patient_unless_the_csv_says_otherwise(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.nii.gz")
    rows = ["a.nii.gz,train,x,p", "b.nii.gz#3,train,y,q", "c.nii.gz,test,y,r"]
    config = csv_of(tmp_path, rows, "path,split,label,who")
    splits = load_dataset(config, 4, splits=("train", "test")).splits
    ids = [*(f"a.nii.gz#{k}" for k in range(6)), "b.nii.gz#3"]
    assert splits["train"].ids.tolist() == ids
    assert splits["train"].patients.tolist() == ["a.nii.gz"] * 6 + ["b.nii.gz"]
    config["csv_patient_column"] = "who"
    assert load_dataset(config, 4, splits=("train", "test")).splits["train"].patients.tolist() == [
        *"pppppp",
        "q",
    ]
    rows[2] = "b.nii.gz#4,test,y,r"
    with pytest.raises(UserError, match=r"1 patients are in more than one split .*b\.nii\.gz"):
        load_dataset(csv_of(tmp_path, rows, "path,split,label,who"), 4, splits=("train", "test"))


def test_class_folders_of_volumes(tmp_path):
    for split, label in itertools.product(("train", "val", "test"), ("x", "y")):
        (tmp_path / split / label).mkdir(parents=True)
        save(tmp_path / split / label / "v.nii.gz")
    dataset = load_dataset(
        {"name": "folder", "dir": str(tmp_path), "plane": "coronal", "window": "60,120"}, 4
    )
    assert len(dataset.splits["val"]) == 2 * 5 and dataset.splits["val"].images.shape[-1] == 1
    assert "30 of 30 images: NIfTI by data.window=60,120" in dataset.spec.notes
    assert set(dataset.splits["test"].patients.tolist()) == {"test/x/v.nii.gz", "test/y/v.nii.gz"}


def test_masks_are_volumes_too(tmp_path):
    labels = (VOLUME // 7 % 3).astype(np.uint8)
    save(tmp_path / "v.nii.gz", stored="LAS")
    # Stored in another order, in the same places.
    save(tmp_path / "m.nii.gz", labels, stored="SPR")
    rows = [f"v.nii.gz#{k},{split},m.nii.gz,p{k}" for k, split in enumerate(("train", "test"))]
    config = csv_of(tmp_path, rows, "path,split,mask,who")
    config |= {"csv_mask_column": "mask", "csv_patient_column": "who", "classes": "a,b,c"}
    splits = load_dataset(config, 6, task="segment", splits=("train", "test")).splits
    seen = (SEEN["axial"](1) // 7 % 3).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(seen).resize((6, 6), Image.Resampling.NEAREST))
    assert (splits["test"].target[0] == wanted).all()
    whole = csv_of(tmp_path, ["v.nii.gz,train,m.nii.gz,p", *rows[1:0]], "path,split,mask,who")
    train = load_dataset({**config, **whole}, 6, task="segment", splits=("train",)).splits["train"]
    assert (train.target[1] == wanted).all() and len(train) == 6


def test_masks_that_do_not_belong_to_their_volume(tmp_path):
    save(tmp_path / "v.nii")
    save(tmp_path / "moved.nii", affine=oblique(25.0))
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "m.png")

    def message(mask):
        rows = [f"v.nii,train,{mask}"]
        config = {**csv_of(tmp_path, rows, "path,split,mask"), "csv_mask_column": "mask"}
        with pytest.raises(UserError) as caught:
            load_dataset(config, 4, task="segment", splits=("train",))
        return str(caught.value)

    assert "does not have the voxels of" in message("moved.nii")
    assert "m.png is one mask, and" in message("m.png")
    assert "gone.nii cannot be read: no such file" in message("gone.nii")
    halves = planes(save(tmp_path / "h.nii", VOLUME / np.float32(4)))[0].source
    with pytest.raises(UserError, match="values that are no integers"):
        decode_mask(halves, 4, 2)


def test_volumes_that_cannot_be_used(tmp_path):
    four = save(tmp_path / "four.nii.gz", np.zeros((4, 5, 6, 2), np.int16))
    assert "4D NIfTI of 4 x 5 x 6 x 2: save each volume as a 3D file" in refusal(four)
    colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "colours or complex numbers" in refusal(save(tmp_path / "rgb.nii", colour))
    for name in ("cut.nii", "cut.nii.gz"):
        path = save(tmp_path / name, np.random.default_rng(0).normal(size=(20, 20, 20)))
        path.write_bytes(path.read_bytes()[:20_000])
        assert "may be truncated or damaged" in refusal(path)
    (tmp_path / "empty.nii").write_bytes(b"")
    assert "the file is empty" in refusal(tmp_path / "empty.nii")
    (tmp_path / "text.nii.gz").write_bytes(b"no volume")
    assert "no gzip file" in refusal(tmp_path / "text.nii.gz")
    (tmp_path / "text.nii").write_bytes(b"no volume" * 100)
    assert "no NIfTI file" in refusal(tmp_path / "text.nii")
    singular = save(tmp_path / "singular.nii")
    content = bytearray(singular.read_bytes())
    content[312:328] = bytes(16)  # the last row of the sform
    singular.write_bytes(content)
    assert "its affine does not say where each axis points" in refusal(singular)
    assert "there is no image 6: it holds 6" in refusal_of_part(save(tmp_path / "v.nii"), 6)


def refusal_of_part(path, index):
    with pytest.raises(UserError) as caught:
        find_images([(path.with_name(f"{path.name}#{index}"), "x#6")], _AXIAL)
    return str(caught.value)


def test_sizes_are_checked_before_anything_is_read(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((30_000, 30_000, 30_000))
    header["vox_offset"] = 352
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 4))
    assert "30000 x 30000 is more than 100,000,000 pixels" in refusal(tmp_path / "huge.nii.gz")
    header.set_data_shape((1024, 1024, 1024))
    header.set_data_dtype(np.float64)
    (tmp_path / "wide.nii").write_bytes(header.binaryblock + b"\0" * 4)
    assert "more than 2,147,483,648 bytes" in refusal(tmp_path / "wide.nii")
    header.set_data_shape((4, 4, 4))
    header["vox_offset"] = 2**30
    (tmp_path / "far.nii").write_bytes(header.binaryblock + b"\0" * 4)
    assert "its data begin after more than" in refusal(tmp_path / "far.nii")


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    path = save(tmp_path / "v.nii.gz")
    assert planes(path)[0].source.labels().max() < 200
    save(path, VOLUME + np.int16(1000))
    assert planes(path)[0].source.labels().min() >= 1000


def test_without_nibabel(tmp_path, monkeypatch):
    path = save(tmp_path / "v.nii")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert "pip install 'medtl_jax[medical]'" in refusal(path)
