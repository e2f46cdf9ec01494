"""TFDS sets as another program would prepare them, and what the reader says of a wrong one."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

# Preparing would draw a bar for each split.
tfds.disable_progress_bar()

kinds = tfds.features
SIZE = 8
PICTURE = kinds.Image(shape=(None, None, 3))
TWO = kinds.ClassLabel(names=["zebra", "ant"])


def encode(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def picture(number, kind="PNG"):
    return encode(np.random.default_rng(number).integers(0, 256, (9, 11, 3), np.uint8), kind)


def plane(number, high=2, scale=1):
    values = np.random.default_rng(number).integers(0, high, (9, 11), np.uint8)
    return encode(values * np.uint8(scale))


@dataclasses.dataclass
class Made:
    """A set as another program would prepare it, shuffled unless asked not to be."""

    name: str
    features: dict
    example: object  # fn(split, row) -> features
    counts: dict
    keys: tuple | None = None
    shuffled: bool = False
    version: str = "1.0.0"
    config: str | None = None

    def prepare(self, root):
        made = self

        class Maker(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = made.name
            VERSION = tfds.core.Version(made.version)
            BUILDER_CONFIGS = (
                [tfds.core.BuilderConfig(name=made.config, version=made.version)]
                if made.config
                else []
            )
            code_path = None

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=kinds.FeaturesDict(made.features),
                    supervised_keys=made.keys,
                    disable_shuffling=not made.shuffled,
                )

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name) for name in made.counts}

            def _generate_examples(self, split):
                for row in range(made.counts[split]):
                    yield row, made.example(split, row)

        Maker(data_dir=root, file_format="array_record").download_and_prepare()
        config = [made.config] if made.config else []
        return root.joinpath(made.name, *config, made.version)


COUNTS = {"train": 12, "validation": 4, "test": 6}


def labelled(name="animals", counts=None, **more):
    features = {"image": PICTURE, "label": TWO, **more.pop("features", {})}
    example = more.pop("example", lambda split, row: {})

    def full(split, row):
        first = {"image": picture(100 * len(split) + row), "label": row % 2}
        return first | example(split, row)

    return Made(name, features, full, counts or COUNTS, **more)


def targeted(feature, target, **features):
    """A set with `image` and the features, whose values `target(row)` gives."""
    return Made(
        "things",
        {"image": PICTURE, **feature, **features},
        lambda split, row: {"image": picture(row), **target(row)},
        {"train": 6, "val": 4, "test": 4},
    )


def load(root, name="animals", **options):
    config = {"name": f"tfds/{name}", "dir": str(root)} | options.pop("config", {})
    return load_dataset(config, SIZE, **options)


def refusal(root, name="animals", **options):
    with pytest.raises(UserError) as caught:
        load(root, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
