"""The SHA-256 by which a file is known to be the one that is meant."""

import hashlib
import pathlib

from medtl_jax.errors import UserError


def check_sha256(path: pathlib.Path, sha256: str, remedy: str) -> pathlib.Path:
    """Return `path` if the file's SHA-256 begins with `sha256`.

    Raises:
      UserError: it does not, or the file cannot be read; the line ends with `remedy`.
    """
    try:
        found = file_sha256(path)
    except OSError as error:
        raise UserError(f"weights file {path}: {error.strerror}; {remedy}") from error
    if not found.startswith(sha256):
        raise UserError(
            f"weights file {path}: its sha256 is {found}, expected {shown_sha256(sha256)}; {remedy}"
        )
    return path


def file_sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of the file at `path`, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown_sha256(sha256: str) -> str:
    """Return `sha256` for a message: dots follow where only its first digits are known."""
    return sha256 if len(sha256) == 64 else f"{sha256}..."
