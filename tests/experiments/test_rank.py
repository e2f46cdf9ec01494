"""`experiment=rank`: networks and weights scored on the training images, before any training."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from experiments import rank
from medtl_jax.data.subset import TrainPlan, divide
from medtl_jax.metrics.transferability import h_score, leep, logme
from medtl_jax.models.registry import create_model, initialize
from medtl_jax.objectives.task import Task
from medtl_jax.runs import ENVIRONMENT, read_json
from medtl_jax.weights.adapt import adapted_input
from medtl_jax.weights.pretrained import open_pretrained, save_weights

STUDY = "--config=configs/finetune.py"
SMALL = {
    "experiment": "rank",
    "model.image_size": 28,
    "data.name": "npz",
    "eval.batch_size": 40,
    "data.val_fraction": 0.25,
}
LABELS = np.arange(40) % 2


def npz(path, labels=LABELS):
    """Squares on noise, brighter in class 1, with the split train alone."""
    images = np.random.default_rng(0).integers(0, 120, (40, 28, 28), np.uint8)
    images[:, 8:20, 8:20] += (LABELS * 40).astype(np.uint8)[:, None, None]
    np.savez(path, x_train=images, y_train=labels)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("rank")


@pytest.fixture(scope="module")
def told(place):
    """Weights of a LeNet-5 that tells three classes apart."""
    network, spec = create_model("lenet5", 3, in_chans=1)
    spec = dataclasses.replace(spec, input=adapted_input(spec.input, 1))
    variables = initialize(network, 28, jax.random.key(3))
    save_weights(place / "a=b.safetensors", variables, spec, Task("classify", ("x", "y", "z")))
    return place / "a=b.safetensors", network, spec, variables


@pytest.fixture
def command(launch, place, monkeypatch, capfd):
    """`fn(workdir, **keys)` -> (exit code, what was printed)."""
    monkeypatch.chdir(rank.__file__.rpartition("/experiments")[0])

    def run(folder, **keys):
        settings = {**SMALL, "data.dir": npz(place / "a.npz"), "transfer.cache_dir": place / "c"}
        settings |= {key.replace("__", "."): value for key, value in keys.items()}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        code = launch.run_command(["launch.py", STUDY, f"--workdir={folder}", *flags])
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return run


def test_candidates_are_scored_on_the_training_images(command, told, place):
    path, network, spec, variables = told
    code, printed = command(place / "run", rank__models=f"lenet5=none, lenet5={path}")
    assert code == 0, printed
    content = read_json(place / "run" / rank.TABLE)
    assert content["split"] == "train" and content["images"] == 30
    found = {record["weights"]: record for record in content["ranking"]}
    scores = found[str(path)]["scores"]
    # The same without the cache and the command: the images that val does not take.
    with np.load(place / "a.npz") as arrays:
        images, labels = arrays["x_train"], arrays["y_train"]
    features, probabilities, labels = by_hand(network, spec, variables, images, labels)
    assert scores["logme"]["value"] == pytest.approx(logme(features, labels), abs=1e-4)
    assert scores["h_score"]["value"] == pytest.approx(h_score(features, labels), abs=1e-4)
    assert scores["leep"]["value"] == pytest.approx(leep(probabilities, labels), abs=1e-4)
    assert found["none"]["scores"]["leep"]["value"] is None
    assert "lenet5=none: no LEEP, weights=none bring no classifier" in printed
    # Sorted as in the file, and said for what it is.
    rows = re.findall(r"^lenet5=(\S+) +84 +(-?\d\.\d+)", printed, re.MULTILINE)
    assert len(rows) == len(content["ranking"]) == 2
    for (shown, _), record in zip(rows, content["ranking"], strict=True):
        # A long path is cut.
        assert record["weights"].startswith(shown.removesuffix("…"))
    assert float(rows[0][1]) >= float(rows[1][1])
    assert "they predict no accuracy" in printed and "predict no accuracy" in content["meaning"]
    assert (place / "run" / "figures" / "ranking.png").read_bytes().startswith(b"\x89PNG")
    digests = [
        card["sha256"] for card in read_json(place / "run" / ENVIRONMENT)["weights"]["candidates"]
    ]
    assert digests[0] == "" and len(digests[1]) == 64
    # The same command again takes the features from the cache and finds the same.
    code, printed = command(place / "run", rank__models=f"lenet5=none, lenet5={path}")
    assert code == 0 and "kept in" not in printed
    again = read_json(place / "run" / rank.TABLE)["ranking"]
    assert [record["scores"] for record in again] == [r["scores"] for r in content["ranking"]]


def by_hand(network, spec, variables, images, labels):
    """Features, the classifier's probabilities and labels of the images that train keeps."""
    names = [f"train/{row:06d}" for row in range(40)]
    plan = TrainPlan(val_fraction=0.25)
    rows = divide(
        [str(label) for label in labels], names, None, plan,
        splits=("train", "val"), has_val=False, source="",
    ).train  # fmt: skip
    image = (images[rows, ..., None] - np.float32(spec.input.mean)) / np.float32(spec.input.std)
    logits, out = network.apply(variables, image)
    return np.asarray(out["features"]), np.asarray(jax.nn.softmax(logits)), labels[rows]


def test_numbers_have_one_score(command, told, place):
    labels = np.linspace(0, 9, 40).astype(np.float32)
    keys = {"data__dir": npz(place / "numbers.npz", labels), "task": "regress"}
    code, printed = command(place / "numbers", rank__models=f"lenet5={told[0]}", **keys)
    assert code == 0, printed
    (record,) = read_json(place / "numbers" / rank.TABLE)["ranking"]
    assert record["scores"]["logme"]["value"] < 0
    for name in ("h_score", "leep"):
        reason = "it is for classes and findings, not for numbers"
        assert record["scores"][name] == {"value": None, "reason": reason}


def test_a_head_that_gives_no_probabilities(told):
    path, _, spec, variables = told
    other = path.with_name("findings.safetensors")
    save_weights(other, variables, spec, Task("multilabel", ("x", "y", "z")))
    task, why = rank._classifier(open_pretrained(spec, other))
    assert task is None and "head is for multilabel" in why
    task, why = rank._classifier(open_pretrained(spec, path))
    assert task.classes == ("x", "y", "z") and why == ""


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rank__models": "lenet5=none,lenet6=none"}, "rank.models: 'lenet6' is not a model"),
        ({"rank__models": "lenet5"}, "'lenet5' is not name=weights"),
        ({"rank__models": "lenet5=none,"}, "'' is not name=weights"),
        ({"rank__models": "lenet5=none, lenet5=none"}, "names lenet5=none twice"),
        ({"rank__models": "lenet5=none,lenet5=no.pth"}, "rank.models lenet5=no.pth: "),
        ({"rank__models": "lenet5=none,vgg16=none"}, "rank.models vgg16=none: model.image_size=28"),
        ({"model__name": "lenet5"}, "model.name='lenet5' has no effect with experiment=rank"),
        ({"task": "segment"}, "not masks"),
        ({"eval__batch_size": 6}, "eval.batch_size"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(command, place, keys, words):
    code, printed = command(place / "none", **{"rank__models": "lenet5=none", **keys})
    assert code == 2 and words in printed and printed.count("\n") == 1, printed
    assert not (place / "none").exists()


def test_weights_may_contain_an_equals_sign():
    url = "https://a.org/b.safetensors#sha256=" + 64 * "0"
    first, second = rank.parse_candidates(f" lenet5 = {url} ,resnet18=imagenet")
    assert (first.model, first.weights) == ("lenet5", url)
    assert (second.model, second.weights) == ("resnet18", "imagenet")
