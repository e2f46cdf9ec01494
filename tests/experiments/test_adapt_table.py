"""A table of adaptations: what it trains, goes on with, concludes and refuses.

The runs inside are stand-ins that write what a run leaves behind; the slow test trains for true.
"""

import json
import pathlib
import shlex
import types

import digit_runs
import numpy as np
import pytest

from medtl_jax import runs
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.seeds import difference, over_seeds, sample_runs
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report.predict import Predictions, write_predictions

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'default.py'}"
# How well the stand-in of each method does on the target, and what validators say of it.
SKILL = {"source": 0.3, "adabn": 2.0, "dann": 1.0, "dann@0.3": 0.8, "supervised": 3.0}
INFOMAX = {"source": 0.2, "adabn": 0.4, "dann": 0.9, "dann@0.3": 0.5, "dsbn": 0.3, "mmd": 0.6}
VAL_LOSS = {"source": 0.1, "adabn": 0.1, "dann": 0.3, "dann@0.3": 0.2, "supervised": 0.4}
SKILL |= {"dsbn": 2.0, "mmd": 2.1}
VAL_LOSS |= {"dsbn": 0.2, "mmd": 0.2}


def command(folder, **settings) -> list[str]:
    usual = {
        "experiment": "adapt",
        "model.name": "lenet5_bn",
        "model.weights": "none",
        "model.image_size": 28,
        "data.name": "npz",
        "data.dir": folder.parent / "source.npz",
        "data.batch_size": 8,
        "domain.target.name": "npz",
        "domain.target.dir": folder.parent / "target.npz",
        "domain.width": 8,
        "eval.resamples": 20,
        "adapt.methods": "source,dann",
        "adapt.seeds": 2,
        **settings,
    }
    flags = [f"--config.{key}={value}" for key, value in usual.items()]
    return ["launch.py", STUDY, *flags, f"--workdir={folder}"]


def write_set(path: pathlib.Path, shade: int, classes: int = 4) -> None:
    """Images of one shade and noise of their own, with labels."""
    arrays, rng = {}, np.random.default_rng(shade)
    for split, count in (("train", 60), ("val", 8), ("test", 40)):
        arrays[f"{split}_images"] = rng.integers(shade, shade + 9, (count, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % classes
    np.savez(path, **arrays)


def without(path: pathlib.Path, *names: str) -> None:
    """Takes arrays out of the file."""
    with np.load(path) as found:
        arrays = {name: array for name, array in found.items() if name not in names}
    np.savez(path, **arrays)


@pytest.fixture
def pair(tmp_path):
    """Two sets of the same numbers of images, whose ids are the same ones."""
    write_set(tmp_path / "source.npz", 50)
    write_set(tmp_path / "target.npz", 150)


@pytest.fixture
def trained(launch, pair, monkeypatch):
    """The names of the runs that were trained, in their order."""
    from experiments import adaptation, domain_settings, finetune, study
    from experiments.prepared import read_training_data
    from medtl_jax.models.registry import model_spec
    from medtl_jax.objectives.task import make_task

    names = []

    def stand_in(request) -> None:
        config, folder = request.config, request.folder
        runs.check_folder(folder, config)
        dataset = read_training_data(request)
        if len(names) == trained.stop_at:
            raise KeyboardInterrupt
        train = dataset.splits["train"]
        task = make_task(dataset.spec, train.target, "corn")
        card = study.weights_card(None, "none", model_spec("lenet5").input, None)
        environment = study.describe(request, dataset, task, card)
        method, tested = folder.name.rpartition("-")[0], {"test": dataset.splits["test"]}
        if domain_settings.wanted(config):
            domains = adaptation.find_domains(config, dataset, request.console, request.memo)
            environment["target"] = adaptation.target_card(domains)
            scored = "test" in domains.scored
            tested = {"test": domains.target.splits["test"]} if scored else {}
        runs.open_folder(folder, config, environment)
        rng = np.random.default_rng(config["seed"])
        predictions = {}
        for split, part in tested.items():
            logits = SKILL[method] * np.eye(4)[part.target] + rng.normal(size=(len(part), 4))
            score = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            predictions[split] = Predictions(
                part.ids, part.target, score.astype(np.float32), part.images
            )
        write_predictions(folder / "predictions.npz", predictions)
        write_epochs(folder, method, config["seed"])
        scores = {
            name: score_with_intervals("classify", p.target, p.score, task.classes, resamples=20)
            for name, p in predictions.items()
        }
        request.console.note(f"note: {method} warns")
        runs.write_json(folder / "metrics.json", scores)
        names.append(folder.name)

    class Trained:
        stop_at = -1

        def __iter__(self):
            return iter(names)

    trained = Trained()
    monkeypatch.setattr(finetune, "run_all", lambda requests: list(map(stand_in, requests)))
    monkeypatch.setattr(finetune, "run", stand_in)
    monkeypatch.setattr(runs, "_commit", lambda: "abc")
    return trained


def write_epochs(folder: pathlib.Path, method: str, seed: int) -> None:
    """Three epochs, the second of which is the best by InfoMax and the last by the oracle."""
    records = []
    for epoch, factor in enumerate((0.5, 1.0, 0.25), 1):
        record = {"epoch": epoch, "val_loss": VAL_LOSS[method] + 0.01 * epoch}
        if method != "supervised":
            record |= {
                "target_infomax": INFOMAX[method] * factor + 0.01 * seed,
                "target_entropy": 1.0 - INFOMAX[method],
                "target_snd": 4.0,
                "oracle_accuracy": 0.5 + 0.1 * epoch + 0.02 * seed,
            }
        if method.startswith("dann"):
            record["discriminator_accuracy"] = 1 - 0.1 * epoch
        records.append(record)
    words = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(words)


@pytest.fixture
def no_figures(launch, monkeypatch):
    """Most of the time is theirs, and stand-ins have no features."""
    from experiments import adapt

    monkeypatch.setattr(adapt, "_figures", lambda *content: {})


def read(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def predicted(folder: pathlib.Path, name: str) -> Predicted:
    with np.load(folder / "cells" / name / "predictions.npz") as found:
        arrays = [found[f"test_{key}"] for key in ("id", "target", "score")]
    return Predicted(name, "classify", tuple("0123"), *arrays)


def test_a_whole_table(launch, trained, no_figures, tmp_path, capsys):
    folder = tmp_path / "table"
    given = command(folder, **{"adapt.methods": "source,adabn,dann"})
    assert launch.run_command(given) == 0
    methods = ("source", "adabn", "dann", "supervised")
    names = [f"{method}-{seed}" for method in methods for seed in (0, 1)]
    assert list(trained) == names
    assert sorted(path.name for path in (folder / "cells").iterdir()) == sorted(names)
    result = read(folder, "adaptation.json")
    assert [method["name"] for method in result["methods"]] == list(methods)
    source, adabn, dann, supervised = result["methods"]
    # The epoch is the second one by InfoMax, and so are all values that are shown.
    assert dann["values"]["infomax"] == pytest.approx([0.9, 0.91])
    assert dann["values"]["source"] == pytest.approx([0.32, 0.32])
    assert dann["values"]["entropy"] == pytest.approx([0.1, 0.1])
    assert supervised["values"] == {} and supervised["oracle"] == []
    # That of the oracle is the best of any epoch.
    assert adabn["oracle"] == pytest.approx([0.8, 0.82])
    # InfoMax picks DANN, whatever target labels say; the source's validation cannot.
    best = max(result["methods"][:3], key=lambda one: one["test"]["auc"]["value"])
    assert (result["picked"], best["name"]) == ("dann", "adabn")
    assert result["picks"] == {
        "source": "source", "entropy": "dann", "infomax": "dann", "snd": "source",
    }  # fmt: skip
    bounds = [method["bound"] for method in result["methods"]]
    assert bounds == ["lower bound: source only", "", "", "upper bound: target labels"]
    assert (result["source"], result["target"], result["images"]) == ("source", "target", 40)
    assert result["summaries"]["dann"].endswith(
        ": domain.method=dann, domain.bn=own, domain.strength=1.0"
    )
    assert "supervised: supervised warns" in result["notes"]
    assert "adabn: adabn warns" in result["notes"]
    drawn = sample_runs((predicted(folder, name) for name in names), resamples=20)
    samples = list(drawn)
    wanted = difference(samples[2:4], samples[:2], "auc")
    found = adabn["against"]["auc"]["estimate"]
    assert found["value"] == pytest.approx(wanted.value)
    assert found["interval"] == pytest.approx(wanted.interval)
    assert source["against"] == supervised["against"] == {}
    mean = over_seeds(samples[4:6], "accuracy")
    entry = read(folder, "metrics.json")["test"]["accuracy/dann"]
    assert entry["value"] == pytest.approx(mean.value) and entry["n"] == 40
    shown = capsys.readouterr().out
    assert "run 6 of 8: dann-0, dann-1, " in shown
    assert launch.run_command(given) == 0
    again = capsys.readouterr().out
    table = (folder / "adaptation.md").read_text(encoding="utf-8")
    assert table in shown and table in again and "is finished" in again
    assert "infomax (in use) picks dann" in table and len(list(trained)) == 8
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "infomax (in use) picks dann" in page and "--config.domain.method=dann" in page


def test_the_report_has_a_sheet_of_what_is_done_to_the_source(
    launch, trained, tmp_path, monkeypatch
):
    from experiments import adapt

    few = types.SimpleNamespace(source=(), target=())
    monkeypatch.setattr(adapt, "features_of", lambda *content: ({"source": few}, ()))
    keys = {"adapt.methods": "source", "adapt.seeds": 1, "adapt.supervised": False}
    folder = tmp_path / "table"
    assert launch.run_command(command(folder, **keys, **{"augment.rotate": 5.0})) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "As in the run source-0. Transforms: flip_horizontal 0.5, shift 0.1, rotate 5, " in page
    assert (folder / "figures" / "augmentation.png").is_file()


def test_losses_beside_own_statistics_are_held_against_these(launch, trained, no_figures, tmp_path):
    folder = tmp_path / "table"
    given = {"adapt.methods": "source,adabn,dsbn,dann,mmd", "adapt.supervised": False}
    assert launch.run_command(command(folder, **given)) == 0
    result = read(folder, "adaptation.json")
    names = ["source", "adabn", "dsbn", "dann", "mmd"]
    kinds = [method["statistics"] for method in result["methods"]]
    assert kinds == ["source", "adabn", "own", "own", "own"]
    assert result["statistics_alone"] == "dsbn"
    runs_of = (predicted(folder, f"{name}-{seed}") for name in names for seed in (0, 1))
    drawn = list(sample_runs(runs_of, resamples=20))
    samples = {name: drawn[2 * k : 2 * k + 2] for k, name in enumerate(names)}
    found = {method["name"]: method["beyond"] for method in result["methods"]}
    assert not found["source"] and not found["adabn"] and not found["dsbn"]
    # Holm over two methods and two metrics: the least p is that of one test times four.
    least = {}
    for name in ("dann", "mmd"):
        for metric in ("auc", "accuracy"):
            wanted, one = difference(samples[name], samples["dsbn"], metric), found[name][metric]
            assert one["estimate"]["value"] == pytest.approx(wanted.value)
            least[wanted.p] = one["adjusted"]
    assert least[min(least)] == pytest.approx(min(1, 4 * min(least)))
    # By the source DANN is better, beside the statistics that it has too it is worse.
    dann = result["methods"][3]
    assert dann["against"]["accuracy"]["verdict"] == "better"
    assert dann["beyond"]["accuracy"]["verdict"] == "worse"
    words = (folder / "adaptation.md").read_text(encoding="utf-8")
    assert "source in source; adabn in adabn; own in dsbn, dann, mmd. A verdict" in words
    assert "verdict against dsbn" in words and result["picked"] == "dann"


@pytest.mark.parametrize(
    ("methods", "more"),
    [("source,dann", {}), ("source,dsbn", {}), ("source,dsbn,dann", {"domain.bn": "adabn"})],
)
def test_without_a_loss_beside_own_statistics_there_is_no_second_verdict(
    launch, trained, no_figures, tmp_path, methods, more
):
    folder = tmp_path / "table"
    given = {"adapt.methods": methods, "adapt.supervised": False, "adapt.seeds": 1, **more}
    assert launch.run_command(command(folder, **given)) == 0
    result = read(folder, "adaptation.json")
    assert result["statistics_alone"] == ""
    assert not any(method["beyond"] for method in result["methods"])


def test_the_target_of_a_table_is_read_once(launch, trained, no_figures, tmp_path, monkeypatch):
    from experiments import adaptation
    from medtl_jax.data import domains

    read_sets, hashed = [], []
    read_target, blake2b = adaptation.read_target, domains.hashlib.blake2b
    monkeypatch.setattr(
        adaptation, "read_target", lambda *a, **k: read_sets.append(a[0]) or read_target(*a, **k)
    )
    monkeypatch.setattr(
        domains.hashlib, "blake2b", lambda *a, **k: hashed.append(1) or blake2b(*a, **k)
    )
    given = {"data.train_fraction": 0.5, "adapt.methods": "source,dann", "adapt.supervised": False}
    assert launch.run_command(command(tmp_path / "table", **given)) == 0
    assert len(list(trained)) == 4 and len(read_sets) == 1
    # At most all 68 of the source and 100 of the target, however many runs there are.
    assert 100 < len(hashed) <= 168
    for name in ("dann-0", "dann-1"):
        card = read(tmp_path / "table" / "cells" / name, "environment.json")["target"]
        assert card["images"] == {"train": 60, "test": 40}


def test_what_each_run_is(launch, trained, no_figures, tmp_path, capsys):
    from medtl_jax.data.readers import load_dataset

    folder = tmp_path / "with spaces"
    (tmp_path / "target.npz").rename(tmp_path / "other.npz")
    settings = {"adapt.methods": "source,dann@0.3", "domain.target.dir": tmp_path / "other.npz"}
    assert launch.run_command(command(folder, **settings)) == 0
    configs = {}
    for name in ("source-0", "dann@0.3-1", "supervised-1"):
        words = shlex.split(read(folder / "cells" / name, "environment.json")["command"])
        alone = [w.replace("--config=configs", f"--config={ROOT}/configs") for w in words[1:]]
        assert not any(word.startswith("--workdir") for word in alone)
        # The stand-in knows its method by the name of its folder.
        assert launch.run_command([*alone, f"--workdir={tmp_path / 'alone' / name}"]) == 0
        configs[name] = read(tmp_path / "alone" / name, "config.json")
        assert configs[name] == read(folder / "cells" / name, "config.json")
    source, dann, bound = configs.values()
    assert (source["domain"]["method"], source["domain"]["bn"]) == ("none", "source")
    assert (dann["domain"]["method"], dann["domain"]["bn"]) == ("dann", "own")
    assert (dann["domain"]["strength"], dann["seed"]) == (0.3, 1)
    assert bound["domain"]["target"] == {"name": "", "dir": "", "csv_where": ""}
    assert bound["data"]["dir"] == str(tmp_path / "other.npz")
    # Its images are the target's, though the source has images of the same ids.
    direct = load_dataset(bound["data"], 28).checksum()
    assert read(folder / "cells" / "supervised-1", "environment.json")["data_sha256"] == direct
    assert capsys.readouterr().err == ""


def test_losses_may_be_added_up(launch):
    from configs import default
    from experiments.adapt_cells import make_cells
    from experiments.adapt_methods import find_method

    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "experiment": "adapt",
            "domain.target.name": "phantom",
            "adapt.methods": "source,cdan_e+mcc,dann + 0.1*mcc@0.3",
            "adapt.seeds": 1,
        }
    )
    cells = make_cells(config.to_dict())
    assert [cell.name for cell in cells[1:-1]] == ["cdan_e+mcc-0", "dann+0.1xmcc@0.3-0"]
    domains = [cell.resolved["domain"] for cell in cells[1:-1]]
    assert [domain["method"] for domain in domains] == ["cdan_e + mcc", "dann + 0.1*mcc"]
    assert [domain["strength"] for domain in domains] == [1.0, 0.3]
    assert "the losses of cdan_e and mcc" in find_method("cdan_e+mcc").summary


def test_a_table_that_was_interrupted_goes_on_to_the_same_result(
    launch, trained, no_figures, tmp_path, capsys
):
    trained.stop_at = 3
    folder = tmp_path / "table"
    assert launch.run_command(command(folder)) == 130
    assert not (folder / "metrics.json").exists() and len(list(trained)) == 3
    trained.stop_at = -1
    assert launch.run_command(command(folder)) == 0
    assert len(list(trained)) == len(set(trained)) == 6
    assert launch.run_command(command(tmp_path / "whole")) == 0
    for name in ("adaptation.json", "adaptation.md", "metrics.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_table_may_grow(launch, trained, no_figures, tmp_path, capsys):
    folder = tmp_path / "table"
    small = {"adapt.methods": "source,dann", "adapt.seeds": 1, "adapt.supervised": False}
    assert launch.run_command(command(folder, **small)) == 0
    assert list(trained) == ["source-0", "dann-0"]
    grown = {"adapt.methods": "source,dann,dann@0.3", "adapt.seeds": 1}
    assert launch.run_command(command(folder, **grown)) == 0
    assert list(trained) == ["source-0", "dann-0", "dann@0.3-0", "supervised-0"]
    assert capsys.readouterr().err == ""
    assert launch.run_command(command(folder, **grown, **{"domain.gamma": 5})) == 2
    assert "holds a run of another config: domain.gamma" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"domain.target.name": "", "domain.target.dir": ""}, "adapt needs a target to adapt to"),
        ({"adapt.methods": "source,magic"}, "adapt.methods='magic' is not known; choose from so"),
        ({"adapt.methods": "source,dann,dann"}, "adapt.methods: dann is there twice"),
        ({"adapt.methods": "source,dann,dann@1"}, "adapt.methods: dann@1 is the same as dann"),
        ({"adapt.methods": "source,"}, "adapt.methods='source,': name one or more"),
        ({"adapt.methods": "dann,mmd"}, "adapt.methods=dann,mmd: source is not among them"),
        ({"adapt.methods": "source,supervised"}, "adapt.methods: supervised trains with the tar"),
        ({"adapt.methods": "source,dann,1*dann"}, "adapt.methods: 1*dann is the same as dann"),
        ({"adapt.methods": "source,dann+magic"}, "adapt.methods='dann+magic': 'magic' is not kno"),
        ({"adapt.methods": "source,dann+dsbn"}, "adapt.methods='dann+dsbn': 'dsbn' is not known"),
        ({"adapt.methods": "source,dann+cdan"}, "dann and cdan want a discriminator each"),
        ({"adapt.methods": "source,adabn@2"}, "'adabn@2': adabn has no strength; those that have"),
        ({"adapt.methods": "source,mmd@0"}, "'mmd@0': '0' must be a positive number, as in mmd@"),
        ({"adapt.methods": "source,mmd@nan"}, "'mmd@nan': 'nan' must be a positive number"),
        ({"adapt.seeds": 0}, "adapt.seeds=0 must be at least 1"),
        ({"domain.method": "dann"}, "domain.method=dann has no effect in a table of adaptations"),
        ({"transfer.groups.low": "features"}, "dann, seed 0: transfer.groups: in no group: stem"),
        (
            {"model.name": "lenet5", "adapt.methods": "source,adabn"},
            "adapt.methods: adabn adapts the statistics of batch norms, and this network has none",
        ),
        ({"domain.select": "magic"}, "there is no validator 'magic'"),
        ({"domain.select": "oracle_auc"}, "nothing may be chosen by them"),
        ({"domain.reads": "stage9"}, "stage9"),
        (
            {"domain.select": "dev", "data.per_class": 2},
            "the validator dev needs 10 training images",
        ),
        ({"data.batch_size": 64}, "data.batch_size=64 is larger than 100% of the training split"),
        ({"optim.discriminator.lr": -1}, "optim.discriminator.lr=-1.0"),
        ({"data.train_fraction": 0.001}, "data.train_fraction=0.001 leaves no training"),
        ({"domain.target.dir": "missing.npz"}, "missing.npz"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    launch, trained, tmp_path, capsys, settings, words
):
    folder = tmp_path / "table"
    assert launch.run_command(command(folder, **settings)) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1, message
    assert not list(trained) and not folder.exists()


def test_targets_that_do_not_fit_are_refused(launch, trained, tmp_path, capsys):
    folder = tmp_path / "table"
    write_set(tmp_path / "few.npz", 90, classes=5)
    without(tmp_path / "target.npz", "train_labels")
    cases = {
        "target.npz": "has none in train: set adapt.supervised=False",
        "source.npz": "all training images of the source source are among those of the target",
        "few.npz": "few.npz",
    }
    for name, words in cases.items():
        settings = {"domain.target.dir": tmp_path / name}
        assert launch.run_command(command(folder, **settings)) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
    assert not list(trained) and not folder.exists()


def test_a_method_that_is_not_for_the_task(launch, trained, tmp_path, capsys):
    with np.load(tmp_path / "source.npz") as found:
        arrays = dict(found)
    for name in ("source", "target"):
        changed = {key: array + (name == "target") for key, array in arrays.items()}
        for split in ("train", "val", "test"):
            count = len(arrays[f"{split}_labels"])
            changed[f"{split}_labels"] = (np.arange(2 * count).reshape(count, 2) // 3) % 2
        np.savez(tmp_path / f"{name}.npz", **changed)
    settings = {"adapt.methods": "source,mcc", "domain.select": "source"}
    assert launch.run_command(command(tmp_path / "table", **settings)) == 2
    message = capsys.readouterr().err
    assert "mcc-0: adapt.methods='mcc': mcc is not for task=multilabel; choose from" in message


def test_a_target_without_test_labels_has_validators_alone(
    launch, trained, no_figures, tmp_path, capsys
):
    folder = tmp_path / "table"
    without(tmp_path / "target.npz", "train_labels", "val_labels", "test_labels")
    settings = {"adapt.supervised": False, "adapt.seeds": 1}
    assert launch.run_command(command(folder, **settings)) == 0
    result = read(folder, "adaptation.json")
    assert result["picked"] == "dann" and result["images"] == 0
    assert all(not method["test"] for method in result["methods"])
    assert read(folder, "metrics.json") == {"test": {}}
    words = (folder / "adaptation.md").read_text(encoding="utf-8")
    assert "there are no target scores" in words and "0.9000 (best)" in words
    assert "all methods: the target has no labels in train and test" in words


def test_seeds_draw_from_the_source_alone(launch, trained, no_figures, tmp_path):
    folder = tmp_path / "table"
    settings = {"adapt.methods": "source,adabn", "data.train_fraction": 0.5}
    assert launch.run_command(command(folder, **settings)) == 0
    data = {
        name: read(folder / "cells" / name, "environment.json")
        for name in ("source-0", "source-1", "adabn-1", "supervised-0", "supervised-1")
    }
    images = {name: found["data"]["images"]["train"] for name, found in data.items()}
    assert images == {
        "source-0": 32, "source-1": 32, "adabn-1": 32, "supervised-0": 60, "supervised-1": 60,
    }  # fmt: skip
    sha = {name: found["data_sha256"] for name, found in data.items()}
    assert sha["source-0"] != sha["source-1"] == sha["adabn-1"]
    assert sha["supervised-0"] == sha["supervised-1"]
    configs = [read(folder / "cells" / name, "config.json")["data"] for name in data]
    assert [config["seed_draw"] for config in configs[:3]] == [0, 1, 1]


@pytest.mark.parametrize(
    ("changed", "key", "what"),
    [("dann-1", "data_sha256", "images"), ("source-1", "target", "images")],
)
def test_runs_of_different_images_are_not_compared(
    launch, trained, no_figures, tmp_path, capsys, changed, key, what
):
    folder = tmp_path / "table"
    assert launch.run_command(command(folder)) == 0
    (folder / "metrics.json").unlink()
    path = folder / "cells" / changed / "environment.json"
    content = read(path.parent, path.name)
    content[key] = {**content[key], "sha256": "0" * 64} if key == "target" else "0" * 64
    path.write_text(json.dumps(content))
    assert launch.run_command(command(folder)) == 2
    message = capsys.readouterr().err
    assert f"cells/{changed} and " in message and f"made with different {what}" in message
    assert message.count("\n") == 1


def test_other_target_images_are_refused_before_a_table_grows(
    launch, trained, no_figures, tmp_path, capsys
):
    folder, small = tmp_path / "table", {"adapt.seeds": 1, "adapt.supervised": False}
    assert launch.run_command(command(folder, **small)) == 0
    with np.load(tmp_path / "target.npz") as found:
        arrays = dict(found)
    arrays["train_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "target.npz", **arrays)
    assert launch.run_command(command(folder, **small | {"adapt.seeds": 2})) == 2
    message = capsys.readouterr().err
    assert "source-0 was made with other images than there are now (target.sha256" in message
    assert message.count("\n") == 1 and len(list(trained)) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("source-0", '{"epoch": 1, "val_loss": 1.0}\n'),
        ("source-0", ""),
        ("dann-0", '{"epoch": 1, "val_loss": 1.0, "target_infomax": "x"}\n'),
    ],
)
def test_damaged_histories_are_named(launch, trained, no_figures, tmp_path, capsys, name, content):
    folder, small = tmp_path / "table", {"adapt.seeds": 1, "adapt.supervised": False}
    assert launch.run_command(command(folder, **small)) == 0
    (folder / "metrics.json").unlink()
    (folder / "cells" / name / "metrics.jsonl").write_text(content)
    assert launch.run_command(command(folder, **small)) == 2
    message = capsys.readouterr().err
    assert "metrics.jsonl is damaged; delete" in message and message.count("\n") == 1


def test_a_table_in_the_place_of_a_run(launch, trained, no_figures, tmp_path, capsys):
    folder = tmp_path / "table"
    small = {"adapt.methods": "source", "adapt.seeds": 1, "adapt.supervised": False}
    assert launch.run_command(command(folder, **small)) == 0
    capsys.readouterr()
    flags = ["--config.experiment=evaluate", f"--config.eval.run={folder}"]
    assert launch.run_command(["launch.py", STUDY, *flags, f"--workdir={tmp_path / 'e'}"]) == 2
    assert capsys.readouterr().err.endswith(
        f"{folder} is a table of adaptations: name one of its runs, such as "
        f"{folder}/cells/source-0\n"
    )


def test_settings_that_no_method_uses_are_named_once(launch, trained, no_figures, tmp_path, capsys):
    settings = {"adapt.methods": "source,adabn", "adapt.seeds": 1}
    assert launch.run_command(command(tmp_path / "without", **settings)) == 0
    said = capsys.readouterr().out
    assert said.count("note: domain.width=8 has no effect") == 1
    settings = {"adapt.methods": "source,dann", "adapt.seeds": 1, "domain.bn": "adabn"}
    assert launch.run_command(command(tmp_path / "with", **settings)) == 0
    said = capsys.readouterr().out
    assert "domain.width" not in said
    assert "note: source: domain.bn='adabn' is not used, the method sets it to 'source'" in said


def test_labels_of_the_target_alone_are_put_into_the_sources_order(launch):
    from experiments.adapt_results import _in_order, order_of
    from medtl_jax.errors import UserError

    score = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], np.float32)
    own = Predicted(
        "run", "classify", ("c", "a", "b"), np.array(["0", "1"]), np.array([0, 2]), score
    )
    found = _in_order(own, ("a", "b", "c"))
    np.testing.assert_array_equal(found.target, [2, 1])
    np.testing.assert_array_equal(found.score, score[:, [1, 2, 0]])
    np.testing.assert_array_equal(found.score.argmax(axis=1), [2, 1])
    findings = Predicted(
        "run", "multilabel", ("c", "a"), own.ids, np.array([[1, 0], [0, 1]]), score[:, :2]
    )
    found = _in_order(findings, ("a", "c"))
    np.testing.assert_array_equal(found.target, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(found.score, score[:, [1, 0]])
    assert order_of(("0", "1"), ("benign", "malignant")) == [0, 1]
    with pytest.raises(UserError, match=r"set adapt\.supervised=False"):
        order_of(("x", "y"), ("benign", "malignant"))


def test_what_a_table_shows_of_its_discriminators(launch, trained, no_figures, tmp_path):
    from experiments.adapt_cells import make_cells
    from experiments.adapt_results import discriminators

    folder, settings = tmp_path / "table", {"adapt.supervised": False}
    assert launch.run_command(command(folder, **settings)) == 0
    cells = make_cells(read(folder, "config.json"))
    # One seed stopped after an epoch.
    path = folder / "cells" / "dann-1" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    found = discriminators(folder, cells)
    assert list(found) == ["dann"]
    assert found["dann"][0] == pytest.approx([0.9, 0.8, 0.7])
    assert found["dann"][1] == [0.9, None, None]


def test_features_have_the_statistics_of_their_domain(launch, small_runs, tmp_path):
    """DSBN on bright and dark digits; the gap without statistics of its own is put beside it."""
    from experiments import finetune, trained
    from experiments.adapt_cells import make_cells
    from experiments.adapt_features import features_of
    from experiments.ladder_requests import cell_request
    from medtl_jax.models.backbone import FEATURES
    from medtl_jax.training.step import eval_step

    digit_runs.write_digits(tmp_path / "source.npz", 3, seed=1)
    with np.load(digit_runs.write_digits(tmp_path / "target.npz", 3, seed=2)) as found:
        arrays = {k: 255 - a if k.endswith("images") else a for k, a in found.items()}
    np.savez(tmp_path / "target.npz", **arrays)
    request = digit_runs.make_request(
        tmp_path / "table",
        tmp_path / "source.npz",
        "none",
        model__name="lenet5_bn",
        domain__target__name="npz",
        domain__target__dir=str(tmp_path / "target.npz"),
        train__epochs=1,
        eval__drift=False,
    )
    section = {"methods": "source,dsbn", "seeds": 1, "supervised": False}
    config = {**request.config, "experiment": "adapt", "adapt": section}
    (cell,), memos = [c for c in make_cells(config) if c.strategy == "dsbn"], {}
    finetune.run(cell_request(cell, request, memos))
    panels, classes = features_of([cell], request, memos)
    found = panels["dsbn"]
    assert classes == ("0", "1", "2") and len(found.source) == 30 and len(found.target) == 96
    np.testing.assert_array_equal(found.target_labels, arrays["train_labels"])
    with np.load(tmp_path / "source.npz") as source:
        np.testing.assert_array_equal(found.source_labels, source["val_labels"])
        bright = source["val_images"][..., None]
    dark = arrays["train_images"][..., None]
    fitted = [trained.open_run(cell.folder(request.folder), of_source=own).fitted for own in (1, 0)]
    of_source, of_target = (
        lambda images, one=one: np.asarray(
            eval_step(one.variables, images, model=one.network, spec=one.spec, output=FEATURES)
        )
        for one in fitted
    )
    np.testing.assert_allclose(found.source, of_source(bright), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.target, of_target(dark), rtol=1e-4, atol=1e-4)
    assert np.abs(of_source(dark) - of_target(dark)).max() > 0.01


@pytest.mark.slow
def test_a_real_table_interrupted_and_resumed(launch, pair, tmp_path, monkeypatch, optax_promotion):
    from experiments import adapt

    settings = {
        "adapt.methods": "source,dann",
        "adapt.seeds": 1,
        "data.batch_size": 20,
        "train.epochs": 2,
        "train.min_steps": 0,
        "train.devices": 1,
        "eval.drift": False,
    }
    folder, whole = tmp_path / "table", tmp_path / "whole"
    with digit_runs.stopped_at(2):
        raise_interrupt(launch, command(folder, **settings))
    assert not (folder / "metrics.json").exists()
    assert launch.run_command(command(folder, **settings)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "_figures", lambda *content: {})
        assert launch.run_command(command(whole, **settings)) == 0
    for name in ("adaptation.json", "metrics.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    result = read(folder, "adaptation.json")
    assert [method["name"] for method in result["methods"]] == ["source", "dann", "supervised"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    # Two metrics, the features of both domains, the discriminator, the contact sheet.
    assert page.count("<img") == 5
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert names == {"auc", "accuracy", "features", "discriminators", "augmentation"}


def raise_interrupt(launch, argv) -> None:
    """Gives the command, which turns the interruption into an exit code, and raises it again."""
    if launch.run_command(argv) == 130:
        raise KeyboardInterrupt
