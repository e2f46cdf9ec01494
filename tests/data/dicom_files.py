"""Small DICOM files, written by pydicom, with what a test wants in their headers."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

# Values that use every stored number that a 12-bit image of four pixels a side needs.
RAMP = np.arange(16, dtype=np.uint16).reshape(4, 4) * 273


def write(path, pixels=RAMP, **elements):
    """Writes `pixels`, `[h, w]`, `[h, w, 3]` or with `NumberOfFrames` `[f, h, w]`; 12 bits in use.

    `elements` overrides the elements of the header, None leaves one out.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    uid = generate_uid(entropy_srcs=[str(path)])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    frames = "NumberOfFrames" in elements
    colour = pixels.ndim == 3 + frames
    values = {
        "PatientName": "Secret^Name",
        "PatientID": "p1",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "Rows": pixels.shape[frames],
        "Columns": pixels.shape[frames + 1],
        "SamplesPerPixel": 3 if colour else 1,
        "PlanarConfiguration": 0 if colour else None,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": 8 if pixels.dtype.itemsize == 1 else 12,
        "HighBit": 7 if pixels.dtype.itemsize == 1 else 11,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **elements,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def table(bits, first, entries, data=None):
    """A LUT item: `entries` from the value `first` on, of so many bits."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "OW", np.asarray(entries, "<u2").tobytes() if data is None else data)
    return item
