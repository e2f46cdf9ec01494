"""Files that are written whole or not at all."""

import os
import pathlib
from typing import Any

from medtl_jax.errors import UserError
from medtl_jax.process import is_writer


def write_file(path: pathlib.Path, content: bytes | str, *, cached: bool = False) -> None:
    """Writes `content` to `path`, replacing it in one step; text as UTF-8.

    Of several processes that run one program the first alone writes, but for what is `cached`: each
    machine has a cache of its own.

    Raises:
      UserError: the disk is full, the folder is not writable, ...; nothing is left behind.
    """
    if not (cached or is_writer()):
        return
    data = content.encode("utf-8") if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space or choose another --workdir"
        ) from error


def is_text(value: Any) -> bool:
    """Whether `value` is a str that can be written as UTF-8.

    A file name of other bytes, or a JSON file made to harm, may hold half a character.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def user_path(text: str, key: str) -> pathlib.Path:
    """The path that a user wrote for the setting `key`, with `~` expanded."""
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={text} is not a path ({error})") from None
