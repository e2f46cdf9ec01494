"""DICOM files: their values against arithmetic by hand, their patients, and clear refusals."""

import pathlib
import sys
import warnings

import numpy as np
import pydicom
import pytest
from dicom_files import RAMP, table, write
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from medtl_jax.data import dicom
from medtl_jax.data.images import decode_image, decode_many
from medtl_jax.data.medical import Reading, find_images, is_dicom, reading_of
from medtl_jax.data.prediction import original_sizes, read_images_for_prediction
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

_ALONE = Reading()


def grey(path, frame=0, window=None):
    """The values of a frame, 0..255, as they are before they are resized."""
    header = dicom.read_header(path)
    return dicom.DicomFrame(path, frame, header.width, header.height, window, "x").read()


def bundled(name):
    """A file that comes with pydicom."""
    return pathlib.Path(get_testdata_file(name, download=False))


def linear(values, centre, width):
    """PS3.3 C.11.2.1.2.1 for a result of 0 to 255."""
    return np.clip(((values - (centre - 0.5)) / (width - 1) + 0.5) * 255, 0, 255)


def refusal(path, reading=_ALONE):
    with pytest.raises(UserError) as caught:
        found = find_images([(path, path.name)], reading)
        decode_many([image.source for images in found for image in images], 4)
    assert "\n" not in str(caught.value) and path.name.partition("#")[0] in str(caught.value)
    return str(caught.value)


def test_ct_in_hounsfield_units():
    path = bundled("CT_small.dcm")
    stored = pydicom.dcmread(path).pixel_array.astype(np.float64)
    found = grey(path, window=(40, 400)).values
    # The file: slope 1, intercept -1024.
    wanted = np.clip((stored - 1024 + 160) / 400 * 255, 0, 255)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    without = grey(path)
    low, high = np.percentile(stored, (0.5, 99.5))
    np.testing.assert_allclose(
        without.values, np.clip((stored - low) / (high - low) * 255, 0, 255), atol=1e-3
    )
    assert "without a window" in without.how and "0.5 to 99.5 per cent" in without.how
    image = decode_image(dicom.DicomFrame(path, 0, 128, 128, (40, 400), "x"), 128)
    assert image.dtype == np.uint8 and (image == np.rint(wanted)).all()


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_padded.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_mr_by_its_own_window_however_it_is_stored(name):
    original = pydicom.dcmread(bundled("MR_small.dcm"))
    assert (original.WindowCenter, original.WindowWidth) == (600, 1600)
    wanted = linear(original.pixel_array.astype(np.float64), 600, 1600)
    np.testing.assert_allclose(grey(bundled(name)).values, wanted, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_rle.dcm",
        "SC_rgb_rle_16bit.dcm",
        "SC_rgb_rle_32bit.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "SC_rgb_dcmtk_+eb+cr.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
    ],
)
def test_colours_of_the_bars(name):
    values = grey(bundled(name)).values
    assert values.shape == (100, 100, 3)
    # The rows of the picture that all of these files hold: red, green, blue, black to white.
    bars = {5: (255, 0, 0), 25: (0, 255, 0), 45: (0, 0, 255), 65: (0, 0, 0), 95: (255, 255, 255)}
    for row, colour in bars.items():
        # YBR and JPEG are not exact.
        np.testing.assert_allclose(values[row, 50], colour, atol=5)


def test_palette():
    path = bundled("examples_palette.dcm")
    dataset = pydicom.dcmread(path)
    red = np.frombuffer(dataset.RedPaletteColorLookupTableData, "<u2")
    wanted = red[dataset.pixel_array] / 65535 * 255
    np.testing.assert_allclose(grey(path).values[..., 0], wanted, atol=1e-3)


def test_linear_exact_and_sigmoid_windows(tmp_path):
    values = RAMP.astype(np.float64)
    view = {"WindowCenter": 2000, "WindowWidth": 1000}
    exact = grey(write(tmp_path / "e.dcm", VOILUTFunction="LINEAR_EXACT", **view)).values
    np.testing.assert_allclose(exact, np.clip((values - 1500) / 1000 * 255, 0, 255), atol=1e-3)
    curve = grey(write(tmp_path / "s.dcm", VOILUTFunction="SIGMOID", **view)).values
    wanted = 255 / (1 + np.exp(-4 * (values - 2000) / 1000))
    np.testing.assert_allclose(curve, wanted, atol=1e-3)
    steep = {"WindowCenter": 4000, "WindowWidth": 1, "VOILUTFunction": "SIGMOID"}
    assert grey(write(tmp_path / "o.dcm", **steep)).values[0, 0] == 0


def test_first_of_several_windows_after_the_rescale_then_inverted(tmp_path):
    path = write(
        tmp_path / "a.dcm",
        RescaleSlope=2,
        RescaleIntercept=-1000,
        WindowCenter=[1500, 9],
        WindowWidth=[3001, 9],
        PhotometricInterpretation="MONOCHROME1",
    )
    wanted = 255 - linear(RAMP * 2.0 - 1000, 1500, 3001)
    np.testing.assert_allclose(grey(path).values, wanted, atol=1e-3)
    # Another window is inverted too: 1000 and less are black, so white.
    np.testing.assert_allclose(
        grey(path, window=(1500, 1000)).values,
        255 - np.clip((RAMP * 2.0 - 2000) / 1000 * 255, 0, 255),
        atol=1e-3,
    )


@pytest.mark.parametrize(("bits", "most"), [(8, 255), (12, 4095), (16, 65535)])
def test_first_voi_lut_goes_before_the_window(tmp_path, bits, most):
    # 3000 entries from the value 500 on, of which those of 8 bits wrap where they are bytes.
    entries = np.linspace(most, 0, 3000).astype(int)
    path = write(
        tmp_path / "a.dcm",
        VOILUTSequence=[table(bits, 500, entries), table(8, 0, [1] * 10)],
        WindowCenter=1,
        WindowWidth=2,
    )
    wanted = entries[np.clip(RAMP.astype(int) - 500, 0, 2999)] / most * 255
    found = grey(path)
    np.testing.assert_allclose(found.values, wanted, atol=1e-3)
    assert "VOI LUT" in found.how


def test_modality_lut_of_signed_values(tmp_path):
    stored = np.array([[-2000, -100], [0, 2047]], np.int16)
    item = table(16, 0, np.arange(3000) * 2)
    item.add_new("LUTDescriptor", "SS", [3000, -100, 16])
    path = write(tmp_path / "a.dcm", stored, ModalityLUTSequence=[item])
    found = grey(path, window=(2000, 4000)).values
    # Entries 0, 0, 100 and 2147, each twice its number.
    np.testing.assert_allclose(
        found, np.array([[0, 0], [200, 4294]]).clip(0, 4000) * 255 / 4000, atol=1e-3
    )


def test_without_a_window(tmp_path):
    stored = np.array([[0, 3], [128, 255]], np.uint8)
    assert grey(write(tmp_path / "8.dcm", stored)).values.tolist() == stored.tolist()
    same = write(tmp_path / "s.dcm", stored, RescaleSlope=1, RescaleIntercept=0)
    assert grey(same).values.tolist() == stored.tolist()
    seven = write(tmp_path / "7.dcm", stored // 2, BitsStored=7, HighBit=6)
    np.testing.assert_allclose(grey(seven).values, stored // 2 * (255 / 127), atol=1e-4)
    padded = RAMP.copy()
    padded[0] = 4095
    found = grey(write(tmp_path / "p.dcm", padded, PixelPaddingValue=4095)).values
    low, high = np.percentile(padded[padded != 4095], (0.5, 99.5))
    np.testing.assert_allclose(
        found, np.clip((padded - low) / (high - low) * 255, 0, 255), atol=1e-3
    )
    assert grey(write(tmp_path / "c.dcm", RAMP * 0)).values.max() == 0


def test_colour_of_equal_channels_is_grey(tmp_path):
    same = np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4, 1), 3, axis=-1)
    found = find_images([(write(tmp_path / "a.dcm", same), "a")], Reading())[0][0]
    assert decode_image(found.source, 4).tolist() == same[..., 0].tolist()
    other = same.copy()
    other[..., 0] = 200
    found = find_images([(write(tmp_path / "b.dcm", other), "b")], Reading())[0][0]
    assert decode_image(found.source, 4).tolist() == other.tolist()


def enhanced(path):
    """Three frames of an enhanced file, the rescale shared and a window of each frame's own."""
    shared, transform = Dataset(), Dataset()
    transform.RescaleSlope, transform.RescaleIntercept = 1, -100
    shared.PixelValueTransformationSequence = [transform]
    own = []
    for frame in range(3):
        window, group = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = 1000 + 500 * frame, 2001
        group.FrameVOILUTSequence = [window]
        own.append(group)
    return write(
        path,
        np.stack([RAMP, RAMP // 2, RAMP // 4]),
        NumberOfFrames=3,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=own,
    )


def test_frames_are_images_with_what_is_said_of_each(tmp_path):
    path = enhanced(tmp_path / "a.dcm")
    for frame in range(3):
        wanted = linear(RAMP // 2**frame - 100.0, 1000 + 500 * frame, 2001)
        np.testing.assert_allclose(grey(path, frame).values, wanted, atol=1e-3)
    images, ids, notes = read_images_for_prediction(tmp_path, 4)
    assert ids.tolist() == ["a.dcm#0", "a.dcm#1", "a.dcm#2"]
    assert images[1, ..., 0].tolist() == np.rint(linear(RAMP // 2 - 100.0, 1500, 2001)).tolist()
    assert notes == ("3 of 3 images: DICOM by the file's first window",)
    assert original_sizes(tmp_path, ["a.dcm#2"]) == [(4, 4)]
    (chosen,) = find_images([(tmp_path / "a.dcm#2", "a.dcm#2")], Reading())
    assert [image.id for image in chosen] == ["a.dcm#2"]
    assert decode_image(chosen[0].source, 4).tolist() == images[2, ..., 0].tolist()
    assert "there is no image 3: it holds 3" in refusal(tmp_path / "a.dcm#3")


def slices(folder, order=(2, 0, 1), series="1.5", patient="p1", **elements):
    """A sagittal series whose file names and numbers tell another order than the positions."""
    for number, place in enumerate(order):
        write(
            folder / f"{number}.dcm",
            np.full((4, 4), 1000 * place, np.uint16),
            SeriesInstanceUID=series,
            PatientID=patient,
            WindowCenter=2000.5,
            WindowWidth=4001,
            InstanceNumber=number,
            **{
                "ImagePositionPatient": [5.0 * place, 7.0, 9.0],
                "ImageOrientationPatient": [0, 1, 0, 0, 0, -1],
                **elements,
            },
        )
    return folder


def test_a_series_is_in_the_order_of_its_places(tmp_path):
    (found,) = find_images([(slices(tmp_path / "s"), "s")], Reading())
    # The normal, y x -z, points against x.
    assert [image.id for image in found] == ["s/0.dcm", "s/2.dcm", "s/1.dcm"]
    slices(tmp_path / "n", ImagePositionPatient=None)
    (found,) = find_images([(tmp_path / "n", "n")], Reading())
    assert [image.id for image in found] == ["n/0.dcm", "n/1.dcm", "n/2.dcm"]
    write(tmp_path / "n" / "x.dcm", SeriesInstanceUID="1.5")
    with pytest.raises(UserError, match="neither ImagePositionPatient nor InstanceNumber"):
        find_images([(tmp_path / "n", "n")], Reading())
    write(tmp_path / "s" / "x.dcm", SeriesInstanceUID="1.6")
    with pytest.raises(UserError, match="holds 2 DICOM series"):
        find_images([(tmp_path / "s", "s")], Reading())
    (tmp_path / "s" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not one of DICOM files alone"):
        find_images([(tmp_path / "s", "s")], Reading())


def test_neighbouring_slices_are_channels(tmp_path):
    slices(tmp_path, order=(2, 0, 1))
    images, ids, _ = read_images_for_prediction(tmp_path, 4, reading=Reading(slices=3))
    assert ids.tolist() == ["0.dcm", "1.dcm", "2.dcm"]
    value = {place: round(1000 * place / 4000 * 255) for place in range(3)}
    # In the order of the places 2, 1, 0, the ends repeated.
    wanted = [(2, 2, 1), (1, 0, 0), (2, 1, 0)]
    assert images[:, 0, 0].tolist() == [[value[k] for k in row] for row in wanted]
    enhanced(tmp_path / "e" / "a.dcm")
    images, _, notes = read_images_for_prediction(tmp_path / "e", 4, reading=Reading(slices=3))
    alone, _, _ = read_images_for_prediction(tmp_path / "e", 4)
    assert (images[1] == np.moveaxis(alone[..., 0], 0, -1)).all()
    assert "neighbouring slices as channels" in notes[0]
    with pytest.raises(UserError, match="reads grey ones"):
        read_images_for_prediction(tmp_path / "e", 4, channels=1, reading=Reading(slices=3))


def test_neighbours_need_slices_in_different_places_of_one_size(tmp_path):
    slices(tmp_path, order=(0, 0))
    with pytest.raises(UserError, match="several slices in one place"):
        read_images_for_prediction(tmp_path, 4, reading=Reading(slices=3))
    write(tmp_path / "1.dcm", RAMP[:3], SeriesInstanceUID="1.5", InstanceNumber=8)
    with pytest.raises(UserError, match="different sizes"):
        read_images_for_prediction(tmp_path, 4, reading=Reading(slices=3))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="this is a picture"):
        read_images_for_prediction(tmp_path, 4, reading=Reading(slices=3))


def class_folders(root, patients=("a", "b", "c", "d", "e", "f"), **elements):
    """Two images in each split and class, each pair of one patient."""
    names = iter(patients)
    for split in ("train", "val", "test"):
        for label in ("cyst", "normal"):
            patient = next(names)
            for number in range(2):
                write(root / split / label / f"{number}.dcm", PatientID=patient, **elements)
    return {"name": "folder", "dir": str(root)}


def test_patients_of_a_folder_come_from_the_files(tmp_path):
    config = class_folders(tmp_path, WindowCenter=2000, WindowWidth=4000)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "train" / "cyst" / "2.png")
    dataset = load_dataset(config, 4)
    train = dataset.splits["train"]
    named = dict(zip(train.ids.tolist(), train.patients.tolist(), strict=True))
    assert named == {
        "train/cyst/0.dcm": "a",
        "train/cyst/1.dcm": "a",
        "train/normal/0.dcm": "b",
        "train/normal/1.dcm": "b",
        "train/cyst/2.png": "train/cyst/2.png",
    }
    note = "patients: by PatientID of the DICOM files (12 images), each picture its own (1 images)"
    assert note in dataset.spec.notes
    assert "Secret" not in repr(dataset)
    assert "12 of 13 images: DICOM by the file's first window" in dataset.spec.notes


def test_a_patient_in_two_splits_is_refused(tmp_path):
    config = class_folders(tmp_path, patients=("a", "b", "c", "d", "e", "a"))
    with pytest.raises(UserError, match=r"1 patients are in more than one split \(first: a\)"):
        load_dataset(config, 4)
    by_file = load_dataset({**config, "dicom_patient": "file"}, 4)
    assert by_file.splits["test"].patients.tolist() == by_file.splits["test"].ids.tolist()
    # All are of one study.
    with pytest.raises(UserError, match=r"first: 1\.2\.3\)"):
        load_dataset({**config, "dicom_patient": "StudyInstanceUID"}, 4)


def test_a_file_without_a_patient_takes_the_study(tmp_path):
    path = write(tmp_path / "a.dcm", PatientID="", StudyInstanceUID="1.9")
    ((image,),) = find_images([(path, "a")], Reading())
    assert (image.patient, image.key) == ("1.9", "StudyInstanceUID")
    path = write(tmp_path / "b.dcm", PatientID=None, StudyInstanceUID=None)
    ((image,),) = find_images([(path, "b")], Reading())
    assert (image.patient, image.key) == ("b", "file")


def csv_of(root, rows, header="path,split,label"):
    (root / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    return {"name": "csv", "dir": str(root / "list.csv")}


def test_csv_lists_files_frames_and_series(tmp_path):
    enhanced(tmp_path / "many.dcm")
    slices(tmp_path / "one", patient="p2")
    # A name of digits, and none of a suffix, as scanners export them.
    write(tmp_path / "1.2.840.7", PatientID="p3")
    write(tmp_path / "IM0001", PatientID="p4")
    rows = ["many.dcm,train,a", "one,train,b", "1.2.840.7,test,a", "IM0001,test,b"]
    dataset = load_dataset(csv_of(tmp_path, rows), 4, splits=("train", "test"))
    train = dataset.splits["train"]
    assert train.ids.tolist() == [
        "many.dcm#0",
        "many.dcm#1",
        "many.dcm#2",
        "one/0.dcm",
        "one/2.dcm",
        "one/1.dcm",
    ]
    assert train.target.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.patients.tolist() == ["p1"] * 3 + ["p2"] * 3
    assert dataset.splits["test"].patients.tolist() == ["p3", "p4"]
    rows[0] = "many.dcm#1,train,a"
    chosen = load_dataset(csv_of(tmp_path, rows), 4, splits=("train", "test")).splits["train"]
    assert chosen.ids.tolist()[0] == "many.dcm#1" and len(chosen) == 4
    assert (chosen.images[0] == train.images[1]).all()
    with pytest.raises(UserError, match=r"'many\.dcm#1' is listed 2 times"):
        load_dataset(csv_of(tmp_path, [*rows, "many.dcm,train,a"]), 4, splits=("train", "test"))


def test_the_column_of_a_csv_says_the_patients(tmp_path):
    slices(tmp_path / "one")
    write(tmp_path / "a.dcm")
    rows = ["one/0.dcm,train,a,x", "one/1.dcm,train,b,y", "one/2.dcm,test,a,z", "a.dcm,test,b,w"]
    config = csv_of(tmp_path, rows, "path,split,label,who")
    with pytest.raises(UserError, match="1 patients are in more than one split"):
        load_dataset(config, 4, splits=("train", "test"))
    dataset = load_dataset({**config, "csv_patient_column": "who"}, 4, splits=("train", "test"))
    assert dataset.splits["train"].patients.tolist() == ["x", "y"]
    assert not any("patients: by" in note for note in dataset.spec.notes)


def test_drawn_splits_keep_patients_whole(tmp_path):
    rows = []
    for number in range(40):
        write(tmp_path / f"{number}.dcm", PatientID=f"p{number // 4}")
        rows.append(f"{number}.dcm,{'ab'[number // 4 % 2]}")
    config = {**csv_of(tmp_path, rows, "path,label"), "csv_split_column": ""}
    splits = load_dataset(config, 4).splits
    homes = [set(splits[name].patients.tolist()) for name in ("train", "val", "test")]
    assert sum(map(len, homes)) == len(set.union(*homes)) == 10
    note = load_dataset(config, 4).spec.notes
    assert any("whole patients" in line for line in note)


def test_a_streamed_set_has_the_same_pixels(tmp_path):
    config = class_folders(tmp_path, WindowCenter=2000, WindowWidth=4000)
    held = load_dataset(config, 4)
    streamed = load_dataset({**config, "cache_gb": 0.0}, 4)
    assert (streamed.splits["val"].images[:] == held.splits["val"].images).all()


def test_files_are_known_by_name_or_mark(tmp_path):
    assert is_dicom(write(tmp_path / "IM1")) and is_dicom(write(tmp_path / "1.2.3"))
    assert not is_dicom(write(tmp_path / "DICOMDIR"))
    (tmp_path / "readme").write_text("x")
    (tmp_path / "a.txt").write_text("x" * 200)
    (tmp_path / "a.dcm").write_text("x")
    assert not is_dicom(tmp_path / "readme") and not is_dicom(tmp_path / "a.txt")
    assert is_dicom(tmp_path / "a.dcm") and not is_dicom(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtplan.dcm", "without pixel data (RTPLAN)"),
        ("JPEGLSNearLossless_16.dcm", "(1.2.840.10008.1.2.4.81): pip install pyjpegls"),
        ("SC_rgb_jpeg_gdcm.dcm", "(1.2.840.10008.1.2.4.70): pip install pylibjpeg pylibjpeg-libj"),
        ("JPGExtended.dcm", "pip install pylibjpeg pylibjpeg-libjpeg may help"),
        ("no_meta.dcm", "no DICOM file: it lacks the mark DICM"),
        ("meta_missing_tsyntax.dcm", "does not say its transfer syntax"),
        ("MR_truncated.dcm", "may be truncated"),
    ],
)
def test_bundled_files_that_cannot_be_used(name, words):
    assert words in refusal(bundled(name))


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_files_that_cannot_be_used(tmp_path):
    big = np.zeros((64, 64), np.uint16)
    assert "may be truncated" in refusal(cut(write(tmp_path / "cut.dcm", big), 0.5))
    assert refusal(cut(write(tmp_path / "head.dcm", big), 0.03))
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert "the file is empty" in refusal(tmp_path / "empty.dcm")
    assert "no such file" in refusal(tmp_path / "gone.dcm")
    huge = write(tmp_path / "huge.dcm", Rows=60000, Columns=60000)
    assert "more than 100,000,000 pixels" in refusal(huge)
    frames = write(tmp_path / "frames.dcm", RAMP[None], NumberOfFrames=2_000_000_000)
    assert "2000000000 images of 4 x 4 are more than" in refusal(frames)
    few = write(tmp_path / "few.dcm", RAMP[None], NumberOfFrames=1000)
    assert "1000 images of 4 x 4 pixels are 32000 or more" in refusal(few)
    odd = write(tmp_path / "odd.dcm", PhotometricInterpretation="HSV")
    assert "photometric interpretation 'HSV'" in refusal(odd)
    narrow = write(tmp_path / "narrow.dcm", WindowCenter=5, WindowWidth=0)
    assert "set data.window" in refusal(narrow)
    assert decode_many([find_images([(narrow, "n")], Reading((5, 10)))[0][0].source], 4)


def test_a_deflated_file_is_inflated_within_limits(monkeypatch):
    path = bundled("image_dfl.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = pydicom.dcmread(path).pixel_array
        assert grey(path).values.tolist() == wanted.tolist()
    monkeypatch.setattr(dicom, "MAX_VOXELS", 10_000)
    assert "it inflates to more than 20,000 bytes" in refusal(path)


def test_without_pydicom(tmp_path, monkeypatch):
    path = write(tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install 'medtl_jax[medical]'" in refusal(path)


def test_names_of_patients_are_not_read(tmp_path):
    path = write(tmp_path / "a.dcm")
    with dicom._opened(path) as (_, dataset):
        assert "PatientName" not in dataset and dataset.PatientID == "p1"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("window", "40", "must be centre,width"),
        ("window", "40,0", "must be centre,width"),
        ("window", "40,nan", "must be centre,width"),
        ("slices", 2, "data.slices must be 1 or 3"),
        ("plane", "oblique", "data.plane must be one of axial"),
        ("dicom_patient", "PatientName", "data.dicom_patient must be one of PatientID"),
    ],
)
def test_settings_that_cannot_be(key, value, words):
    with pytest.raises(UserError, match=words):
        reading_of({key: value})
    assert reading_of({"window": " -600, 1500"}).window == (-600.0, 1500.0)
