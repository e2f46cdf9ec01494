"""Real weights on real photographs and radiographs: the classes and the features make sense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_jax.models import registry
from medtl_jax.models.inputs import normalize
from medtl_jax.weights.pretrained import fill, open_pretrained
from medtl_jax.weights.sources import find_weights

pytestmark = pytest.mark.slow

CAFFE = "bvlc_googlenet_caffe.npz"
SIZES = {
    "googlenet_caffe": 224,
    "efficientnet_lite0": 224,
    "efficientnet_lite1": 240,
    "efficientnet_lite2": 260,
}
# Indices of ImageNet's 1000 classes.
ESPRESSO = 967
TABBY, TIGER_CAT, EGYPTIAN = 281, 282, 285
CATS = {TABBY, TIGER_CAT, 283, EGYPTIAN, 287}
MONASTERY_OR_PALACE = {663, 698}
MISSILE = 657
# ImageNet has no dahlia: a daisy, or a honeycomb for its cells.
LIKE_A_DAHLIA = {985, 599}


@pytest.fixture(scope="module")
def photographs():
    """name -> `[h, w, 3]` uint8."""
    data = pytest.importorskip("skimage.data", reason="its photographs need scikit-image")
    china, flower = sklearn.datasets.load_sample_images().images
    names = ("chelsea", "coffee", "rocket", "astronaut")
    return {name: getattr(data, name)() for name in names} | {"china": china, "flower": flower}


def resized(image, size, box=None):
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box))


def centre(image):
    """The box (left, upper, right, lower) of the largest centred square."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


@functools.cache
def classifier(name, words):
    """`probabilities(images [b, s, s, 3] in 0..255) -> [b, 1000]`."""
    model, spec = registry.create_model(name, 1000)
    weights = open_pretrained(spec, find_weights(name, words))
    variables, _ = fill(registry.variable_shapes(model, SIZES[name]), weights)

    @jax.jit
    def probabilities(variables, images):
        return jax.nn.softmax(model.apply(variables, normalize(images, weights.input))[0])

    return lambda images: np.asarray(probabilities(variables, images))


@pytest.fixture(scope="module")
def classify(shared, photographs):
    """`classify(model, channels) -> {photograph: probabilities [1000]}`."""

    def run(name, channels=(0, 1, 2)):
        words = str(shared / "weights" / CAFFE) if name == "googlenet_caffe" else "imagenet"
        images = [resized(x, SIZES[name], centre(x))[..., channels] for x in photographs.values()]
        found = classifier(name, words)(np.stack(images))
        return dict(zip(photographs, found, strict=True))

    return run


def top(probabilities, count):
    return set(probabilities.argsort()[-count:].tolist())


@pytest.mark.parametrize("name", SIZES)
def test_photographs_get_sensible_classes(classify, name):
    found = classify(name)
    assert top(found["chelsea"], 1) <= CATS
    assert found["chelsea"][[TABBY, TIGER_CAT, EGYPTIAN]].sum() > 0.7
    assert top(found["coffee"], 1) == {ESPRESSO}
    assert found["coffee"][ESPRESSO] > 0.5
    assert top(found["china"], 1) <= MONASTERY_OR_PALACE
    assert MISSILE in top(found["rocket"], 3)
    assert LIKE_A_DAHLIA & top(found["flower"], 3)


def test_swapped_colours_spoil_the_espresso(classify):
    """Caffe's kernels read blue, green, red: loaded without the swap this is what they see."""
    right = classify("googlenet_caffe")["coffee"]
    swapped = classify("googlenet_caffe", channels=(2, 1, 0))["coffee"]
    assert top(swapped, 1) != {ESPRESSO}
    assert swapped[ESPRESSO] < 0.3 * right[ESPRESSO]


FEATURES_SIZE = 64
# The side of the squares that are cut out of the photographs.
CUT = (96, 160)


@pytest.fixture(scope="module")
def vgg(shared):
    """`features(images [b, s, s, 1], pretrained) -> [b, 512]`, drawn weights otherwise."""
    model, spec = registry.create_model("vgg16_gap", 2)
    path = shared / "weights" / "vgg16_imagenet_notop_keras_HWIO.npz"
    image = jnp.zeros((1, FEATURES_SIZE, FEATURES_SIZE, 3))
    drawn = jax.jit(model.init)(jax.random.key(0), image)
    weights = open_pretrained(spec, path)
    loaded, report = fill(drawn, weights, dont_load=("params/head/.*",))
    assert len(report.loaded) == 26

    @jax.jit
    def forward(variables, images):
        images = jnp.broadcast_to(images, (*images.shape[:3], 3))
        return model.apply(variables, normalize(images, weights.input))[1]["features"]

    def features(images, pretrained=True, batch=50):
        assert len(images) % batch == 0
        parts = np.split(images, len(images) // batch)
        return np.concatenate([forward(loaded if pretrained else drawn, x) for x in parts])

    return features


def fitted(features, labels):
    model = LogisticRegression(C=1e-3, max_iter=1000)
    return make_pipeline(StandardScaler(), model).fit(features, labels)


def test_features_of_vgg_recognise_pneumonia(shared, vgg):
    """No comparison here: at 28 pixels features of drawn weights, and bare pixels, do as well."""
    rng = np.random.default_rng(0)
    path = shared / "data" / "medmnist" / "pneumoniamnist_reassembled.npz"
    with np.load(path) as stored:
        images, labels = {}, {}
        for split in ("train", "test"):
            chosen = rng.permutation(len(stored[f"{split}_labels"]))[:200]
            pixels = stored[f"{split}_images"][chosen]
            images[split] = np.stack([resized(x, FEATURES_SIZE) for x in pixels])[..., None]
            labels[split] = stored[f"{split}_labels"][chosen, 0]
    model = fitted(vgg(images["train"]), labels["train"])
    scores = model.decision_function(vgg(images["test"]))
    assert roc_auc_score(labels["test"], scores) >= 0.9


def cut(photographs, rng, half, count):
    """Grey squares `[n, s, s, 1]` from the left (0) or right (1) halves, and whose they are."""
    images, labels = [], []
    for label, photograph in enumerate(photographs.values()):
        grey = photograph.mean(-1).astype(np.uint8)
        height, width = grey.shape
        for _ in range(count):
            side = rng.integers(*CUT, endpoint=True)
            left = half * (width // 2) + rng.integers(width // 2 - side, endpoint=True)
            upper = rng.integers(height - side, endpoint=True)
            images.append(resized(grey, FEATURES_SIZE, (left, upper, left + side, upper + side)))
            labels.append(label)
    return np.stack(images)[..., None], np.array(labels)


def test_pretrained_features_beat_drawn_ones(photographs, vgg):
    """From which photograph is a piece of its right half, having seen pieces of the left ones?

    Grey, so that colour does not tell. One in six is right by chance.
    """
    rng = np.random.default_rng(0)
    (seen, labels), (unseen, wanted) = (cut(photographs, rng, half, 15) for half in (0, 1))

    def accuracy(features):
        return fitted(features(seen), labels).score(features(unseen), wanted)

    pretrained = accuracy(functools.partial(vgg, batch=45))
    drawn = accuracy(functools.partial(vgg, batch=45, pretrained=False))
    pixels = accuracy(lambda images: images.reshape(len(images), -1).astype(np.float64))
    assert pretrained >= 0.6
    assert pretrained >= max(drawn, pixels) + 0.15
