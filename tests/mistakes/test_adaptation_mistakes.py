"""The user's mistakes about an adaptation: one line, exit code 2, nothing written."""

import numpy as np
import pytest
from mistake_commands import ROOT, TINY, class_folders, set_keys

STUDY = f"--config={ROOT / 'configs' / 'default.py'}"
PHANTOM = {"domain__target__name": "phantom"}
DANN = {**PHANTOM, "domain__method": "dann"}
OWN = {**PHANTOM, "domain__bn": "own"}
AFFINE = {"domain__affine": True}
NO_NORMS = "adapts the statistics of batch norms, and this network has none"


@pytest.fixture
def refuse(refusal):
    """`refuse(**settings) -> message` of a small LeNet without weights, on the phantom."""

    def call(**settings):
        usual = {"model__name": "lenet5_bn", "model__weights": "none"}
        return refusal(*set_keys(**{**usual, **settings}), study=(STUDY, *TINY))

    return call


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"domain__method": "dann"}, "domain.method=dann needs a target: set domain.target.name"),
        ({"domain__bn": "own"}, "domain.bn=own needs a target: set domain.target.name"),
        ({"domain__target__dir": "x"}, "domain.target.dir=x needs domain.target.name, such as fol"),
        (
            {**PHANTOM, "domain__target__csv_where": "a=b"},
            "domain.target.csv_where=a=b chooses rows of a csv, and domain.target.name is 'ph",
        ),
        ({"domain__target__csv_where": "a=b"}, "and domain.target.name is ''"),
        ({"data__csv_where": "a=b"}, "data.csv_where=a=b chooses rows of a csv, and data.name is"),
        ({**PHANTOM, "domain__method": "dan"}, "domain.method='dan': 'dan' is not known; write"),
        ({"domain__method": "dan"}, "domain.method='dan': 'dan' is not known; write"),
        (
            {**PHANTOM, "domain__method": "dann + cdan"},
            "dann and cdan want a discriminator each, and there is one: name one of them",
        ),
        ({**DANN, "domain__bn": "mine"}, "domain.bn='mine' is not known; choose from auto, source"),
        ({**DANN, "domain__select": "best"}, "there is no validator 'best': choose from source, e"),
        ({**DANN, "domain__select": "oracle_accuracy"}, "uses target labels, and nothing may be"),
        ({**DANN, "domain__select": "oracle"}, "uses target labels, and nothing may be chosen"),
        ({**DANN, "domain__reads": "stage9"}, "adaptation cannot read 'stage9' of the network; ch"),
        ({**DANN, "domain__strength": -1.0}, "domain.strength=-1.0 must be at least 0"),
        ({**DANN, "domain__gamma": -1.0}, "domain.gamma=-1.0 must be at least 0"),
        ({**DANN, "domain__width": 0}, "domain.width=0 must be at least 1"),
        ({**DANN, "optim__discriminator__lr": 0.0}, "optim.discriminator.lr"),
        ({**DANN, "model__image_size": 4}, "model.image_size=4: lenet5_bn takes"),
        ({**PHANTOM, "domain__bn": "own", "model__name": "lenet5"}, f"domain.bn=own {NO_NORMS}"),
        (
            {**PHANTOM, "domain__bn": "adabn", "model__name": "lenet5"},
            f"domain.bn=adabn {NO_NORMS}: choose a model with batch norms, or another method",
        ),
        *(
            (
                {**OWN, "transfer__bn__low": policy, "transfer__bn__high": policy},
                f"domain.bn=own has no effect: with transfer.bn.low={policy}, transfer.bn.high="
                f"{policy} and these transfer.groups no batch norm moves its statistics; let",
            )
            for policy in ("stats", "freeze")
        ),
        (
            {**OWN, **DANN, "transfer__strategy": "lpft"},
            "domain.bn=own has no effect: with transfer.bn.low=stats, transfer.bn.high=stats",
        ),
        (
            {
                **OWN,
                "transfer__groups__frozen": "stem,stage.*,features",
                "transfer__groups__high": "head",
            },
            "domain.bn=own has no effect: with transfer.bn.low=train, transfer.bn.high=train a",
        ),
        (
            {**OWN, **AFFINE},
            "domain.affine=True: no loss on the target's images would train its scale and bias in "
            "stem, stage1",
        ),
        (
            {**DANN, **AFFINE, "domain__strength": 0.0},
            "would train its scale and bias in stem, stage1",
        ),
        (
            {**DANN, **AFFINE, "domain__reads": "stem"},
            "would train its scale and bias in stage1",
        ),
        (
            {**DANN, **AFFINE, "domain__bn": "adabn"},
            "domain.affine=True does not go with domain.bn=adabn, which works out statistics alone",
        ),
        (
            {**DANN, "transfer__cache": "prefix"},
            "transfer.cache=prefix keeps no maps of the target's images, which the adaptation need",
        ),
        (
            {**DANN, "experiment": "extract"},
            "domain.target.name=phantom is for a training: use experiment=finetune or adapt, not",
        ),
        ({**DANN, "experiment": "ladder"}, "domain"),
        ({**DANN, "experiment": "find_lr"}, "domain.target.name=phantom is for a training"),
        (
            {**PHANTOM, "domain__target__dir": "x"},
            "domain.target.dir=x has no effect: the phantom is in no folder; leave it out",
        ),
        (
            {"domain__target__name": "folder", "domain__target__dir": "absent"},
            "domain.target: ",
        ),
        ({"domain__target__name": "folders"}, "unknown domain.target.name 'folders': choose fro"),
        (
            {**DANN, "task": "segment", "domain__method": "mcc"},
            "domain.method='mcc': mcc is not for task=segment; choose from dann, mmd, coral, entro",
        ),
        (
            {**DANN, "task": "segment", "domain__select": "dev"},
            "the validator 'dev' needs the log loss of one class an image, which task=segment has",
        ),
        (
            {**DANN, "task": "multilabel", "domain__reads": "logits"},
            "domain.reads=logits: dann reads them as the probabilities of classes",
        ),
        (
            {**PHANTOM, "task": "regress"},
            "the validator 'infomax' needs probabilities, which task=regress does not predict",
        ),
    ],
)
def test_settings_that_do_not_go_together(refuse, settings, words):
    message = refuse(**settings)
    assert words in message, message


def write_npz(path, seed=0, counts=(16, 8, 8), **changes):
    rng, arrays = np.random.default_rng(seed), {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 32, 32), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)
    np.savez(path, **(arrays | changes))
    return path


def test_targets_that_are_none(refuse, tmp_path):
    source, same = write_npz(tmp_path / "source.npz"), write_npz(tmp_path / "same.npz")
    read = {"data__name": "npz", "data__dir": source, "domain__target__name": "npz"}
    with np.load(source) as arrays:
        seen = arrays["val_images"]
    overlapping = write_npz(tmp_path / "overlap.npz", seed=1, test_images=seen)
    few = write_npz(tmp_path / "few.npz", seed=2, counts=(4, 4, 8))
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    for target, settings, words in (
        (same, {}, "all training images of the source source are among those of the target same"),
        (source, {}, "all training images of the source source are among"),
        (overlapping, {}, "8 test images of the target overlap are in the split val of the sou"),
        (few, {"domain__select": "dev"}, "the validator dev needs 10 training images of each dom"),
        (empty, {"domain__target__name": "folder"}, "has no images: add some"),
    ):
        message = refuse(**{**read, "domain__target__dir": target, **settings})
        assert words in message, message


def test_classes_of_other_names(refuse, tmp_path):
    source = class_folders(tmp_path / "source")
    target = class_folders(tmp_path / "target", ("healthy", "ill"))
    message = refuse(
        data__name="folder",
        data__dir=source,
        data__batch_size=4,
        # The images of all classes are the same.
        data__audit="off",
        domain__target__name="folder",
        domain__target__dir=target,
    )
    assert "(cyst, normal)" in message and "(healthy, ill)" in message
    assert "have different names: rename one set's classes to the other's" in message
