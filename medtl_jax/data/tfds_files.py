"""Prepared TFDS sets on disk: found by name, checked, and read record by record, no TensorFlow."""

import dataclasses
import difflib
import functools
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medtl_jax.data.images import one_line
from medtl_jax.errors import UserError

# Names that TFDS sets give to our splits.
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}

_NAME = re.compile(
    r"(?P<set>[A-Za-z][A-Za-z0-9_]*)(/(?P<config>[A-Za-z0-9_.+=-]*[A-Za-z0-9_+=-]))?"
    r"(:(?P<version>\d+\.\d+\.\d+))?",
    re.ASCII,
)
_VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
_FEATURE_CLASS = re.compile(r"tensorflow_datasets\.core\.features(\.[A-Za-z0-9_]+)+", re.ASCII)
# Where a description names the class of a feature; `type` is what TFDS 4.3 and older wrote.
_CLASS_KEYS = ("pythonClassName", "python_class_name")
_OLD_CLASS_KEYS = (*_CLASS_KEYS, "type")
_JSON_AS_TEXT = ("json", "content")
_MAX_JSON_BYTES = 16 * 2**20
_INFO, _FEATURES = "dataset_info.json", "features.json"
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Record:
    """An encoded image in a record, which opens like a file; `str()` names it in messages."""

    reader: "SplitReader"
    index: int
    feature: str

    def open(self, mode: str) -> BinaryIO:
        """Returns a stream of the encoded image; `mode` is "rb"."""
        return io.BytesIO(self.reader.encoded(self.index, self.feature))

    def __str__(self) -> str:
        return f"{self.reader.name}/{self.index:06d} ({self.feature})"


class SplitReader:
    """The records of one split; each time they are asked for, read from their files.

    Attributes:
      name: of the split in the set.
    """

    def __init__(self, name: str, records: Any, features: Any):
        """Takes the split's name, serialised records by index, and TFDS's features dictionary."""
        self.name = name
        self._records = records
        self._features = features
        self._image = functools.cache(self._image_reader)

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, index: int, feature: str) -> bytes:
        """Returns the bytes of the image `feature` of a record, as they were stored."""
        content = self._image(feature)(self._records[index])[feature]
        if not isinstance(content, bytes):
            raise UserError(f"the feature {feature} holds no encoded image")
        return content

    def _image_reader(self, feature: str) -> Callable[[bytes], dict[str, Any]]:
        import tensorflow_datasets as tfds

        parser = tfds.features.FeaturesDict({feature: self._features[feature]})
        skip = {feature: tfds.decode.SkipDecoding()}
        return functools.partial(parser.deserialize_example_np, decoders=skip)

    def rows(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Yields the features `names` of each record, in order."""
        import tensorflow_datasets as tfds

        parser = tfds.features.FeaturesDict({name: self._features[name] for name in names})
        for start in range(0, len(self), _BLOCK):
            block = range(start, min(start + _BLOCK, len(self)))
            for record in self._records.__getitems__(list(block)):
                yield parser.deserialize_example_np(record) if names else {}


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A set that TFDS, or `data.export`, has written.

    Attributes:
      folder: with its files.
      name: without configuration and version.
      features: TFDS's description of a record, by name.
      readers: of its train, val and test, where it has them.
      supervised: names of the input and of the target that the set proposes, or None.
      metadata: what whoever wrote the set noted beside it.
      licence: "" where nobody said.
    """

    folder: Path
    name: str
    features: Any
    readers: dict[str, SplitReader]
    supervised: tuple[str, str] | None
    metadata: dict[str, Any]
    licence: str


def open_prepared(name: str, root: Path) -> PreparedSet:
    """Returns the set `name`: "builder", "builder/config" or "builder:1.0.0", in the folder `root`.

    It is read from its files alone: no code of a builder is run, nothing is downloaded. The
    newest version is taken unless one is named.

    Raises:
      UserError: no such set is prepared there, not as array_record, or its files are damaged or
        no data set.
    """
    folder = find_folder(name, root)
    _check_json(folder)
    builder = or_damaged(folder, lambda: _open_builder(folder))
    info = builder.info
    if not hasattr(info.features, "keys"):
        raise UserError(f"{folder}: its records have no named features")
    readers = {}
    for split, names in SPLIT_NAMES.items():
        found = next((candidate for candidate in names if candidate in info.splits), None)
        if found is not None and info.splits[found].num_examples:
            _check_shards(info.splits[found], folder)
            records = or_damaged(folder, lambda found=found: _open_records(builder, found))
            readers[split] = SplitReader(split, records, info.features)
    keys = info.supervised_keys
    plain = isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(k, str) for k in keys)
    return PreparedSet(
        folder,
        info.name,
        info.features,
        readers,
        keys if plain else None,
        dict(info.metadata or {}),
        " ".join(str(info.redistribution_info.license or "").split()),
    )


def _open_builder(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    kind = builder.info.file_format.value if builder.info.file_format else "an old format"
    if kind != "array_record":
        raise UserError(
            f"{folder} is prepared as {kind}, which needs TensorFlow to be read: prepare the set "
            "as array_record (tfds build --file_format=array_record)"
        )
    return builder


def _open_records(builder: Any, split: str) -> Any:
    import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def or_damaged(folder: Path, read: Callable[[], Any]) -> Any:
    """Returns `read()`; where that fails, a UserError that the set in `folder` is damaged."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:
        # What TFDS, protobuf and the reader raise for damaged files is of many types.
        raise UserError(
            f"{folder} is not a readable TFDS set: {one_line(error)}; prepare it again"
        ) from error


def find_folder(name: str, root: Path) -> Path:
    """Returns the folder of the set `name` below `root`, that of the newest version by default.

    Raises:
      UserError: no such set is prepared there.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"data.name=tfds/{name} names no TFDS set: write tfds/builder, tfds/builder/config or "
            "tfds/builder:1.0.0"
        )
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (data.dir must be the data_dir of TFDS)")
    base = root / match["set"]
    if match["config"]:
        base /= match["config"]
    versions = _versions(base)
    if not versions and not match["config"] and base.is_dir():
        configs = [child.name for child in sorted(base.iterdir()) if _versions(child)]
        if len(configs) > 1:
            raise UserError(
                f"{base} holds several configurations: set data.name to one of "
                + ", ".join(f"tfds/{match['set']}/{config}" for config in configs)
            )
        versions = _versions(base / configs[0]) if configs else {}
    if match["version"]:
        versions = {key: path for key, path in versions.items() if path.name == match["version"]}
    if not versions:
        raise UserError(f"no TFDS set '{name}' is prepared in {root}: {_advice(match, root)}")
    return versions[max(versions)]


def _versions(base: Path) -> dict[tuple[int, ...], Path]:
    """Returns the folders of the prepared versions below `base`, by version."""
    if not base.is_dir():
        return {}
    return {
        tuple(map(int, child.name.split("."))): child
        for child in base.iterdir()
        if _VERSION.fullmatch(child.name) and (child / _INFO).is_file()
    }


def _advice(match: re.Match[str], root: Path) -> str:
    """Returns how to prepare a set that TFDS knows, or the names that are near to a wrong one."""
    import tensorflow_datasets as tfds

    prepared = sorted(
        child.name
        for child in root.iterdir()
        if child.is_dir() and (_versions(child) or any(map(_versions, child.iterdir())))
    )
    known = tfds.list_builders(with_community_datasets=False)
    if match["set"] in known:
        return f"run tfds build {match[0]} --data_dir={root} --file_format=array_record"
    near = difflib.get_close_matches(match["set"], [*prepared, *known], 3)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"it has {', '.join(prepared) or 'none'}, and TFDS knows no set of this name"


def _check_json(folder: Path) -> None:
    """Raises UserError unless the descriptions are small, and name classes of TFDS alone.

    TFDS imports the module of whatever class the description of a feature names.
    """
    for name, keys in ((_INFO, _CLASS_KEYS), (_FEATURES, _OLD_CLASS_KEYS)):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} has no {name}: prepare the set again, with TFDS 4 or newer")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {_MAX_JSON_BYTES // 2**20} MiB: no TFDS set")
        try:
            found = list(_class_names(json.loads(path.read_bytes()), keys))
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        strange = [name for name in found if not _FEATURE_CLASS.fullmatch(name)]
        if strange:
            raise UserError(
                f"{path} names the class {strange[0]!r}, which is not one of TFDS's own: it is "
                "not loaded"
            )


def _class_names(node: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Yields what a description names as classes, also inside JSON that is kept as text."""
    if isinstance(node, list):
        for child in node:
            yield from _class_names(child, keys)
    if not isinstance(node, dict):
        return
    yield from (node[key] for key in keys if isinstance(node.get(key), str))
    for key, child in node.items():
        if key in _JSON_AS_TEXT and isinstance(child, str):
            yield from _class_names(json.loads(child), _OLD_CLASS_KEYS)
        else:
            yield from _class_names(child, keys)


def _check_shards(split: Any, folder: Path) -> None:
    """Raises UserError unless the split's files lie in `folder` and can hold its records."""
    size = 0
    for name in map(str, split.filepaths):
        path = Path(name)
        if path.parent.resolve() != folder.resolve():
            raise UserError(f"{folder} names files outside of it ({path}): they are not read")
        if not path.is_file():
            raise UserError(f"{folder} lacks {path.name}: prepare the set again")
        size += path.stat().st_size
    if split.num_examples > size:
        raise UserError(
            f"{folder / _INFO} declares {split.num_examples} records of '{split.name}' in "
            f"{size} bytes: prepare the set again"
        )
