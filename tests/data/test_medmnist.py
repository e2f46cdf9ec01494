"""MedMNIST: the publisher's table, files and downloads."""

import hashlib
import io
import pathlib
import types

import numpy as np
import pooch
import pytest
import requests
from image_sets import (
    SPLITS,
    arrays,
    npz_set,
    refusal,
)

from medtl_jax.data import medmnist
from medtl_jax.data.readers import load_dataset

SHARED = pathlib.Path(__file__).resolve().parents[2] / ".." / "shared"


def test_table_is_complete():
    assert len(medmnist.TABLE) == 12
    sums = [md5 for known in medmnist.TABLE.values() for md5 in known.md5]
    assert len(set(sums)) == 48 and all(len(bytes.fromhex(md5)) == 16 for md5 in sums)
    # Numbers of classes as in Table 1 of Yang et al. 2023 (Scientific Data 10:41).
    assert {flag: len(known.classes) for flag, known in medmnist.TABLE.items()} == {
        "pathmnist": 9, "chestmnist": 14, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2,
        "retinamnist": 5, "breastmnist": 2, "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11,
        "organcmnist": 11, "organsmnist": 11,
    }  # fmt: skip


def test_official_breastmnist():
    folder = SHARED / "data" / "medmnist"
    if not (folder / "breastmnist.npz").is_file():
        pytest.skip("../shared/data/medmnist/breastmnist.npz is not here")
    dataset = load_dataset({"name": "medmnist/breastmnist", "dir": str(folder)}, 28)
    assert [len(dataset.splits[split]) for split in SPLITS] == [546, 78, 156]
    assert np.bincount(dataset.splits["test"].target).tolist() == [42, 114]
    assert dataset.spec.licence == "CC BY 4.0" and dataset.spec.notes == ()
    assert dataset.spec.source.startswith("https://zenodo.org/records/10519652/files/breastmnist")


def test_local_copy_with_another_md5_is_refused(tmp_path):
    npz_set(tmp_path, arrays(), "breastmnist.npz")
    message = refusal({"name": "medmnist/breastmnist", "dir": str(tmp_path)})
    assert "750601b1f35ba3300ea97c75c52ff8f6" in message and "data.name=npz" in message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("organmnist3d", "3D sets are not supported"),
        ("breastmnist_32", "choose from pathmnist"),
        ("breastmnist_", "choose from pathmnist"),
        ("../breastmnist", "choose from pathmnist"),
    ],
)
def test_sets_that_are_not_read(flag, words):
    assert words in refusal({"name": f"medmnist/{flag}"})


def test_dir_of_medmnist_must_be_a_folder(tmp_path):
    config = npz_set(tmp_path, arrays())
    assert "must be a folder" in refusal(config | {"name": "medmnist/breastmnist"})


@pytest.mark.parametrize(
    "error", [requests.ConnectionError("no route\nto host"), ValueError("MD5 of\nfile differs")]
)
def test_failed_download_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **keys):
        raise error

    monkeypatch.setattr(pooch, "retrieve", fail)
    message = refusal({"name": "medmnist/breastmnist_128", "dir": str(tmp_path)})
    assert "zenodo.org/records/10519652/files/breastmnist_128.npz" in message
    assert f"save it as {tmp_path / 'breastmnist_128.npz'}" in message


def test_download_goes_to_the_cache_and_reports_progress(tmp_path, monkeypatch):
    made = arrays((4, 4), classes=5)
    stream = io.BytesIO()
    np.savez(stream, **made)
    body = stream.getvalue()
    known = medmnist.TABLE["retinamnist"]
    md5 = (hashlib.md5(body).hexdigest(), *known.md5[1:])
    replaced = medmnist.MedMnistSet(known.classes, known.task, known.licence, md5)
    monkeypatch.setitem(medmnist.TABLE, "retinamnist", replaced)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    asked = []

    def get(url, **keys):
        asked.append(url)
        return types.SimpleNamespace(
            raise_for_status=lambda: None,
            headers={"content-length": str(len(body))},
            iter_content=lambda chunk_size: [body],
        )

    monkeypatch.setattr(requests, "get", get)
    calls = []
    for _ in range(2):
        dataset = load_dataset({"name": "medmnist/retinamnist"}, 4, lambda *c: calls.append(c))
    assert asked == ["https://zenodo.org/records/10519652/files/retinamnist.npz?download=1"]
    assert (tmp_path / "medtl_jax" / "retinamnist.npz").read_bytes() == body
    assert calls[-1] == (len(body), len(body), "downloading retinamnist.npz")
    assert dataset.spec.notes == (
        "ordinal grades are read as classes without an order: see task=ordinal",
    )
    assert dataset.spec.name == "medmnist/retinamnist"
