"""The maps of the networks: sides and channels as published, at the sizes of the originals."""

import jax
import jax.numpy as jnp
import pytest

from medtl_jax.models import registry

# (side, channels) of the stem and of the stages.
MAPS = {
    ("baseline_cnn", 28): [(28, 32), (14, 64), (7, 128), (3, 256)],
    ("alexnet", 224): [(55, 64), (27, 192), (13, 384), (13, 256), (13, 256)],
    ("vgg16", 224): [(224, 64), (112, 128), (56, 256), (28, 512), (14, 512)],
    ("googlenet", 224): [
        (112, 64),
        (56, 192),
        (28, 480),
        (14, 512),
        (14, 528),
        (14, 832),
        (7, 1024),
    ],
    ("inception_v3", 299): [(147, 64), (71, 192), (35, 288), (17, 768), (8, 2048)],
    ("resnet50", 224): [(112, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)],
    ("resnet18_3x3", 28): [(28, 64), (28, 64), (14, 128), (7, 256), (4, 512)],
    ("densenet121", 224): [(112, 64), (56, 256), (28, 512), (14, 1024), (7, 1024)],
    ("mobilenet_v2", 224): [
        (112, 32),
        (112, 16),
        (56, 24),
        (28, 32),
        (14, 64),
        (14, 96),
        (7, 160),
        (7, 320),
    ],
}
FEATURES = {"baseline_cnn": 256, "alexnet": 4096, "vgg16": 4096, "googlenet": 1024}
FEATURES |= {"inception_v3": 2048, "resnet50": 2048, "resnet18_3x3": 512, "densenet121": 1024}
FEATURES |= {"mobilenet_v2": 1280}


@pytest.mark.parametrize(("name", "size"), MAPS)
def test_maps_have_the_published_sides_and_channels(name, size):
    model, _ = registry.create_model(name, 10)
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    (_, out), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    widths = [(f"stage{i}" if i else "stem", pair) for i, pair in enumerate(MAPS[name, size])]
    expected = {stage: (2, side, side, width) for stage, (side, width) in widths}
    expected["features"] = (2, FEATURES[name])
    assert {stage: x.shape for stage, x in out.items()} == expected
