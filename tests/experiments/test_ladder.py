"""A ladder of strategies: what it trains, goes on with, concludes and refuses.

The runs inside are stand-ins that write what a run leaves behind; the slow tests train for true.
"""

import dataclasses
import json
import pathlib
import shlex

import jax
import numpy as np
import pytest

from medtl_jax import runs
from medtl_jax.metrics.compare import Predicted
from medtl_jax.metrics.seeds import difference, over_seeds, sample_runs
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report.predict import Predictions, write_predictions
from medtl_jax.weights.files import read_weights

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'default.py'}"
# How well the stand-in of each strategy does, and what validation says of it: not the same.
SKILL = {"scratch": 0.4, "full": 1.5, "head": 2.5, "knn": 1.0, "l2sp": 1.5}
VAL_LOSS = {"scratch": 0.9, "full": 0.2, "head": 0.3, "knn": 0.6, "l2sp": 0.5}

SEGMENT = {
    "model.name": "resnet18",
    "model.image_size": 32,
    "data.phantom.train": 20,
    "data.phantom.val": 4,
    "data.phantom.test": 4,
}


def command(folder, **settings) -> list[str]:
    usual = {
        "experiment": "ladder",
        "model.name": "lenet5",
        "model.image_size": 28,
        "data.name": "npz",
        "data.dir": folder.parent / "digits.npz",
        "data.batch_size": 8,
        "eval.resamples": 100,
        "ladder.strategies": "head,full,knn",
        "ladder.fractions": "1,0.5",
        "ladder.seeds": 2,
        **settings,
    }
    flags = [f"--config.{key}={value}" for key, value in usual.items()]
    return ["launch.py", STUDY, *flags, f"--workdir={folder}"]


@pytest.fixture
def digits(tmp_path):
    """A set of four classes: 60 images to train on, 8 and 40 others."""
    arrays = {}
    for split, count in (("train", 60), ("val", 8), ("test", 40)):
        arrays[f"{split}_images"] = np.full((count, 28, 28), count, np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 4
    np.savez(tmp_path / "digits.npz", **arrays)


@pytest.fixture
def trained(launch, digits, monkeypatch):
    """The names of the runs that were trained, in their order; weights are of no account."""
    from experiments import extract, finetune, study
    from experiments.prepared import read_training_data
    from medtl_jax.data import readers
    from medtl_jax.models.registry import model_spec
    from medtl_jax.objectives.task import make_task

    names, read, brief = [], [], []

    def stand_in(request) -> None:
        config, folder = request.config, request.folder
        runs.check_folder(folder, config)
        dataset = read_training_data(request)
        if len(names) == trained.stop_at:
            raise KeyboardInterrupt
        train, test = dataset.splits["train"], dataset.splits["test"]
        task = make_task(dataset.spec, train.target, "corn")
        card = study.weights_card(None, "none", model_spec("lenet5").input, None)
        runs.open_folder(folder, config, study.describe(request, dataset, task, card))
        strategy = config["transfer"]["strategy"]
        rng = np.random.default_rng(config["seed"])
        skill = SKILL[strategy] + 0.2 * rng.normal() + config["data"]["train_fraction"]
        score = np.exp(skill * np.eye(4)[test.target] + rng.normal(size=(len(test), 4)))
        score = (score / score.sum(axis=1, keepdims=True)).astype(np.float32)
        found = Predictions(test.ids, test.target, score, test.images, test.patients)
        write_predictions(folder / "predictions.npz", {"test": found})
        losses = (2.0, VAL_LOSS[strategy] + 0.01 * config["seed"], 1.0)
        records = [{"epoch": i, "val_loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        cost = {"prepare_seconds": 0.5, "train_seconds": 2.0, "cpu_seconds": 3.0 + config["seed"]}
        memory = None if config["experiment"] == "extract" else 4e6
        cost |= {"device": "cpu", "step_bytes": memory, "data_bytes": memory}
        # Runs of an earlier version do not have it, and it may be unknown.
        cost |= {"full": {"compile_seconds": 1.5}, "knn": {"compile_seconds": None}}.get(
            strategy, {}
        )
        runs.write_json(folder / "cost.json", cost)
        scored = score_with_intervals("classify", test.target, score, task.classes, resamples=20)
        runs.write_json(folder / "metrics.json", {"test": scored})
        request.console.note(f"note: {strategy} warns\n\x1b")
        request.console.note("no warning")
        names.append(folder.name)
        brief.append(request.brief)

    class Trained:
        stop_at = -1

        def __iter__(self):
            return iter(names)

        @property
        def brief(self) -> bool:
            return all(brief)

        @property
        def reads(self) -> int:
            return len(read)

    def load_dataset(*arguments, **choice):
        read.append(arguments)
        return readers.load_dataset(*arguments, **choice)

    trained = Trained()
    for module in (finetune, extract):
        monkeypatch.setattr(module, "run", stand_in)
    monkeypatch.setattr(finetune, "run_all", lambda requests: list(map(stand_in, requests)))
    monkeypatch.setattr(runs, "_commit", lambda: "abc")
    monkeypatch.setattr(study, "open_weights", lambda config, console: None)
    monkeypatch.setattr(study, "load_dataset", load_dataset)
    return trained


@pytest.fixture
def no_figures(launch, monkeypatch):
    """Most of the time is theirs, and they are the subject of one test."""
    from experiments import ladder

    monkeypatch.setattr(ladder, "ladder_figures", lambda found: {})
    monkeypatch.setattr(ladder, "study_sheet", lambda *content: {})


def read(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def cell_predictions(folder: pathlib.Path, name: str) -> Predicted:
    with np.load(folder / "cells" / name / "predictions.npz") as found:
        arrays = [found[f"test_{key}"] for key in ("id", "target", "score")]
    classes = tuple(read(folder / "cells" / name, "environment.json")["data"]["classes"])
    return Predicted(name, "classify", classes, *arrays)


def test_a_whole_ladder(launch, trained, tmp_path, capsys):
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder)) == 0
    names = [f"{s}-{p}-{k}" for p in (50, 100) for s in ("head", "full", "knn") for k in (0, 1)]
    assert list(trained) == names
    assert sorted(path.name for path in (folder / "cells").iterdir()) == sorted(names)
    assert trained.brief and trained.reads == 1, "all draws are taken from what was read once"
    result = read(folder, "ladder.json")
    assert [level["fraction"] for level in result["levels"]] == [0.5, 1.0]
    assert [level["images"] for level in result["levels"]] == [[32, 32], [60, 60]]
    # Validation prefers full, whatever the test says.
    assert [level["picked"] for level in result["levels"]] == ["full", "full"]
    best = max(result["levels"][1]["rungs"], key=lambda rung: rung["test"]["auc"]["value"])
    assert best["strategy"] == "head"
    head, full, knn = result["levels"][0]["rungs"]
    assert full["validation"] == pytest.approx([0.2, 0.21]) and full["against"] == {}
    assert head["cost"] == {
        "seconds": 2.5, "device_seconds": 3.5, "step_bytes": 4e6, "compile_seconds": None,
    }  # fmt: skip
    assert full["cost"]["compile_seconds"] == 1.5
    assert [level["val_images"] for level in result["levels"]] == [[8, 8], [8, 8]]
    assert [level["drawn"] for level in result["levels"]] == [True, False]
    assert result["settings"]["knn"] == {"experiment": "extract", "probe.kind": "knn"}
    assert result["settings"]["head"]["transfer.cache"] == "prefix"
    assert result["notes"] == [f"{name}: {name} warns \x1b" for name in ("head", "full", "knn")]
    assert knn["cost"]["step_bytes"] is None and result["device"] == "CPU"
    assert (result["images"], result["patients"]) == (40, None)
    samples = list(
        sample_runs((cell_predictions(folder, name) for name in names[:4]), resamples=100)
    )
    wanted = difference(samples[:2], samples[2:], "auc")
    found = head["against"]["auc"]
    assert found["estimate"]["value"] == pytest.approx(wanted.value)
    assert found["estimate"]["interval"] == pytest.approx(wanted.interval)
    assert found["verdict"] in ("better", "worse", "cannot tell")
    mean = over_seeds(samples[2:], "accuracy")
    entry = read(folder, "metrics.json")["test"]["accuracy@50/full"]
    assert entry["value"] == pytest.approx(mean.value) and entry["n"] == 40
    assert entry["ci95"] == pytest.approx(mean.interval)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5 and "validation picks full" in page
    assert len(list((folder / "figures").iterdir())) == 5
    # Of the first run that augments; the head learns from kept features.
    assert "As in the run full-50-0. Transforms: flip_horizontal 0.5, shift 0.1, " in page
    assert (folder / "figures" / "augmentation.png").is_file()
    assert not [*folder.glob("cells/*/report.html"), *folder.glob("cells/*/figures")]
    shown = capsys.readouterr().out
    assert "run 12 of 12: knn-100-0, knn-100-1, " in shown
    # Once more: nothing is trained, the same table is shown.
    assert launch.run_command(command(folder)) == 0
    again = capsys.readouterr().out
    table = (folder / "ladder.md").read_text(encoding="utf-8")
    assert table in shown and table in again and "is finished" in again
    assert len(list(trained)) == 12


def test_the_command_of_a_run_repeats_it_alone(launch, trained, no_figures, tmp_path, capsys):
    folder = tmp_path / "with spaces"
    settings = {"model.weights": "my weights.npz", "ladder.strategies": "scratch,full,knn"}
    assert launch.run_command(command(folder, **settings)) == 0
    config = read(folder / "cells" / "full-50-1", "config.json")
    assert (config["seed"], config["data"]["seed_draw"]) == (1, 1)
    assert config["data"]["train_fraction"] == 0.5
    configs = {}
    for name in ("scratch-50-0", "full-50-1", "knn-100-0"):
        words = shlex.split(read(folder / "cells" / name, "environment.json")["command"])
        assert words[:2] == ["python", "launch.py"]
        alone = [w.replace("--config=configs", f"--config={ROOT}/configs") for w in words[1:]]
        # It goes into a folder of its own, not into that of the finished run.
        assert not any(word.startswith("--workdir") for word in alone)
        assert launch.run_command([*alone, f"--workdir={tmp_path / name}"]) == 0
        configs[name] = read(tmp_path / name, "config.json")
        assert configs[name] == read(folder / "cells" / name, "config.json")
    weights = [config["model"]["weights"] for config in configs.values()]
    assert weights == ["none", "my weights.npz", "my weights.npz"]
    assert capsys.readouterr().err == ""


def test_a_ladder_that_was_interrupted_goes_on_to_the_same_result(
    launch, trained, no_figures, tmp_path, capsys
):
    trained.stop_at = 5
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder)) == 130
    assert not (folder / "metrics.json").exists() and len(list(trained)) == 5
    trained.stop_at = -1
    assert launch.run_command(command(folder)) == 0
    assert len(list(trained)) == len(set(trained)) == 12
    assert launch.run_command(command(tmp_path / "whole")) == 0
    for name in ("ladder.json", "ladder.md", "metrics.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_ladder_may_grow(launch, trained, no_figures, tmp_path, capsys):
    folder = tmp_path / "ladder"
    small = {"ladder.strategies": "full", "ladder.seeds": 1, "ladder.fractions": "1"}
    assert launch.run_command(command(folder, **small)) == 0
    assert "one seed says nothing" in (folder / "ladder.md").read_text(encoding="utf-8")
    grown = {"ladder.strategies": "full,l2sp", "ladder.fractions": "1"}
    assert launch.run_command(command(folder, **grown)) == 0
    assert list(trained) == ["full-100-0", "full-100-1", "l2sp-100-0", "l2sp-100-1"]
    assert read(folder, "config.json")["ladder"]["strategies"] == "full,l2sp"
    assert "full@" not in capsys.readouterr().err
    assert launch.run_command(command(folder, **grown, **{"optim.low.lr": 1e-3})) == 2
    assert "holds a run of another config: optim.low.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"ladder.strategies": "full,magic"},
            "ladder.strategies='magic' is not known; choose from sc",
        ),
        ({"ladder.strategies": "full,head,full"}, "ladder.strategies: full is there twice"),
        ({"ladder.strategies": "full,"}, "ladder.strategies='full,': name one or more"),
        ({"ladder.reference": "decay"}, "ladder.reference='decay' is not among"),
        ({"ladder.fractions": "0,1"}, "ladder.fractions: 0 must be more than 0 and at most 1"),
        ({"ladder.fractions": "1.5"}, "ladder.fractions: 1.5 must be more than 0 and at most 1"),
        ({"ladder.fractions": "half"}, "ladder.fractions: 'half' is not a number"),
        ({"ladder.fractions": "nan"}, "ladder.fractions: nan must be"),
        ({"ladder.fractions": "0.5,0.50"}, "ladder.fractions: 50% is there twice"),
        ({"ladder.seeds": 0}, "ladder.seeds=0 must be at least 1"),
        ({"transfer.strategy": "full"}, "transfer.strategy=full has no effect in a ladder"),
        ({"data.train_fraction": 0.5}, "data.train_fraction=0.5 has no effect in a ladder"),
        ({"transfer.groups.low": "features"}, "head at 50%, seed 0: transfer.groups.low"),
        ({"ladder.fractions": "0.001"}, "digits: ladder.fractions=0.001 leaves no training"),
        ({"data.per_class": 3}, "ladder.fractions=1,0.5 and data.per_class=3 both draw"),
        (
            {"ladder.strategies": "full,head@2"},
            "'head@2': head has no alpha; those that have: l2sp",
        ),
        ({"ladder.strategies": "full,l2sp@0"}, "'l2sp@0': '0' must be a positive number, as in"),
        ({"ladder.strategies": "full,l2sp@nan"}, "'l2sp@nan': 'nan' must be a positive number"),
        ({"ladder.strategies": "full,l2sp@.1,l2sp@0.1"}, "l2sp@0.1 is the same as l2sp@.1; leave"),
        ({"ladder.strategies": "full,l2sp,l2sp@0.01"}, "l2sp@0.01 is the same as l2sp; leave one"),
        (
            # 0.5 is the only fraction at which there are fewer epochs than phases.
            {
                "ladder.strategies": "full,gradual",
                "ladder.fractions": "0.25,1",
                "train.epochs": 1,
                "train.min_steps": 10,
            },
            "gradual-100-0: transfer.phases: 3 phases need at least 3 epochs, and there are 2; "
            "leave gradual out of ladder.strategies, or raise train.epochs\n",
        ),
        (
            {"model.name": "googlenet", "model.image_size": 224, "model.auxiliary": 0.3},
            "head-50-0: transfer.cache=prefix: auxiliary heads",
        ),
        ({"optim.warmup_epochs": 40}, "head-100-0: optim.warmup_epochs=40.0 must be at least 0"),
        ({"train.focal_gamma": 1, "data.name": "none"}, "unknown data.name 'none'"),
        (
            {"task": "segment", "ladder.strategies": "full,knn", "data.name": "phantom", **SEGMENT},
            "knn-50-0: a segmentation has no one vector an image to probe: leave knn out of ladder",
        ),
        ({"train.select": "dice"}, "head-50-0: train.select='dice' is no value"),
        ({"data.batch_size": 52}, "head-50-0: data.batch_size=52 is larger than 50% of the"),
        ({"model.image_size": 8}, "head-50-0: model.image_size=8"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    launch, trained, tmp_path, capsys, settings, words
):
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder, **settings)) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not list(trained) and not folder.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"epoch": 2, "val_loss": 1.0}\n', "metrics.jsonl is damaged; delete"),
        ("metrics.jsonl", '{"epoch": 1}\n', "metrics.jsonl is damaged; delete"),
        (
            "metrics.jsonl",
            f'{{"epoch": 1, "val_loss": 1{"0" * 400}}}\n',
            "jsonl is damaged; delete",
        ),
        ("metrics.jsonl", '{"epoch": 1, "val_loss": NaN}\n', "metrics.jsonl is damaged; delete"),
        ("cost.json", "{}", "cost.json is damaged; delete"),
        ("cost.json", '{"prepare_seconds": "1"}', "cost.json is damaged; delete"),
        ("cost.json", f'{{"prepare_seconds": 1{"0" * 400}}}', "cost.json is damaged; delete"),
        ("notes.json", '{"notes": [1]}', "notes.json is damaged; delete"),
    ],
)
def test_damaged_runs_are_named(
    launch, trained, no_figures, tmp_path, capsys, name, content, words
):
    small = {"ladder.strategies": "full", "ladder.seeds": 1, "ladder.fractions": "1"}
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder, **small)) == 0
    (folder / "metrics.json").unlink()
    (folder / "cells" / "full-100-0" / name).write_text(content)
    assert launch.run_command(command(folder, **small)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("data_sha256",), 5),
        (("weights_sha256",), None),
        (("backend",), ["cpu"]),
        (("data", "name"), {}),
        (("data", "notes"), "note"),
        (("data", "images", "train"), 10**400),
        (("data", "images", "val"), True),
        (("data", "images"), []),
    ],
)
def test_environments_of_other_types_are_one_line(
    launch, trained, no_figures, tmp_path, capsys, keys, value
):
    small = {"ladder.strategies": "full", "ladder.seeds": 1, "ladder.fractions": "1"}
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder, **small)) == 0
    (folder / "metrics.json").unlink()
    path = folder / "cells" / "full-100-0" / "environment.json"
    content = json.loads(path.read_text())
    section = content
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    path.write_text(json.dumps(content))
    assert launch.run_command(command(folder, **small)) == 2
    message = capsys.readouterr().err
    assert "environment.json is damaged; delete" in message and message.count("\n") == 1


def test_other_images_are_refused_before_a_ladder_grows(
    launch, trained, no_figures, tmp_path, capsys
):
    folder, small = tmp_path / "ladder", {"ladder.strategies": "full,head"}
    assert launch.run_command(command(folder, **small)) == 0
    with np.load(tmp_path / "digits.npz") as found:
        arrays = dict(found)
    arrays["test_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "digits.npz", **arrays)
    grown = command(folder, **small | {"ladder.seeds": 3})
    assert launch.run_command(grown) == 2
    message = capsys.readouterr().err
    assert "cells/full-50-0 was made with other images than there are now" in message
    assert message.count("\n") == 1 and len(list(trained)) == 8


@pytest.mark.parametrize(
    ("changed", "key", "what"),
    [("full-50-1", "data_sha256", "images"), ("knn-100-0", "weights_sha256", "weights")],
)
def test_runs_of_different_images_or_weights_are_not_compared(
    launch, trained, no_figures, tmp_path, capsys, changed, key, what
):
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder)) == 0
    (folder / "metrics.json").unlink()
    path = folder / "cells" / changed / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "0" * 64}))
    assert launch.run_command(command(folder)) == 2
    message = capsys.readouterr().err
    assert f"cells/{changed} and " in message and f"made with different {what}" in message
    assert message.count("\n") == 1


def test_several_alphas_are_strategies_of_their_own(launch, trained, no_figures, tmp_path):
    SKILL.update({"l2sp@0.1": 1.6, "l2sp@1": 0.2})
    VAL_LOSS.update({"l2sp@0.1": 0.1, "l2sp@1": 0.8})
    folder = tmp_path / "ladder"
    settings = {"ladder.strategies": "full,l2sp@0.1,l2sp@1", "ladder.fractions": "1"}
    assert launch.run_command(command(folder, **settings)) == 0
    result = read(folder, "ladder.json")
    assert result["levels"][0]["picked"] == "l2sp@0.1"
    for name, alpha in (("l2sp@0.1", 0.1), ("l2sp@1", 1.0)):
        assert read(folder / "cells" / f"{name}-100-0", "config.json")["transfer"]["alpha"] == alpha
        assert result["settings"][name]["transfer.alpha"] == alpha
        assert result["summaries"][name].endswith(f"; alpha {alpha:g}")
    assert "accuracy@100/l2sp@0.1" in read(folder, "metrics.json")["test"]


def test_phases_that_do_not_fit_a_ladder_that_has_begun(
    launch, trained, no_figures, tmp_path, capsys
):
    folder = tmp_path / "ladder"
    usual = {"ladder.fractions": "1", "train.epochs": 1, "train.min_steps": 10}
    assert launch.run_command(command(folder, **usual, **{"ladder.strategies": "full"})) == 0
    grown = {**usual, "ladder.strategies": "full,gradual"}
    assert launch.run_command(command(folder, **grown)) == 2
    assert capsys.readouterr().err.endswith(
        "gradual-100-0: transfer.phases: 3 phases need at least 3 epochs, and there are 2; leave "
        "gradual out of ladder.strategies, or begin another --workdir with more epochs\n"
    )


def test_notes_on_the_draw_name_the_settings_of_the_ladder(launch, trained, no_figures, tmp_path):
    folder = tmp_path / "ladder"
    settings = {"ladder.strategies": "full", "ladder.fractions": "0.5", "ladder.seeds": 1}
    assert launch.run_command(command(folder, **settings)) == 0
    notes = read(folder, "ladder.json")["notes"]
    assert any("(ladder.fractions=0.5)" in note for note in notes)
    assert not any("train_fraction" in note for note in notes)


@pytest.mark.parametrize("kind", ["evaluate", "predict", "compare"])
def test_a_ladder_in_the_place_of_a_run(launch, trained, no_figures, tmp_path, capsys, kind):
    from experiments import compare
    from medtl_jax.commands import run_tool

    folder = tmp_path / "ladder"
    settings = {"ladder.strategies": "full,knn", "ladder.fractions": "1", "ladder.seeds": 1}
    assert launch.run_command(command(folder, **settings)) == 0
    capsys.readouterr()
    if kind == "compare":
        assert run_tool(compare.main, [str(folder), str(folder / "cells" / "knn-100-0")]) == 2
    else:
        flags = [f"--config.experiment={kind}", f"--config.eval.run={folder}"]
        assert launch.run_command(["launch.py", STUDY, *flags, f"--workdir={tmp_path / kind}"]) == 2
    message = capsys.readouterr().err
    assert message.endswith(
        f"{folder} is a ladder: name one of its runs, such as {folder}/cells/full-100-0\n"
    )
    assert message.count("\n") == 1 and not (tmp_path / kind).exists()


def test_settings_of_the_study_that_a_strategy_overwrites_are_named(launch):
    from configs import default
    from experiments.cells import overwritten_settings
    from experiments.ladder_cells import make_cells

    config = default.get_config()
    config.ladder.update(strategies="full,groups,l2sp@0.01", seeds=2)
    config.transfer.groups.low = "stage4"
    config.transfer.groups.high = "head"
    config.transfer.alpha = 0.01
    config = config.to_dict()
    lines = overwritten_settings(make_cells(config), config)
    assert [line.split("=")[0] for line in lines] == [
        f"{name}: transfer.groups.{group}"
        for name in ("full", "groups", "l2sp@0.01")
        for group in ("low", "high")
    ]
    assert lines[2] == (
        "groups: transfer.groups.low='stage4' is not used, the strategy sets it to ''"
    )


def test_notes_survive_an_interruption_and_a_report_that_is_gone_is_not_named(
    launch, trained, no_figures, tmp_path, capsys
):
    folder, trained.stop_at = tmp_path / "ladder", 1
    settings = {"ladder.strategies": "full,head", "ladder.fractions": "1", "ladder.seeds": 1}
    assert launch.run_command(command(folder, **settings)) == 130
    trained.stop_at = -1
    assert launch.run_command(command(folder, **settings)) == 0
    text = (folder / "ladder.md").read_text(encoding="utf-8")
    assert text.endswith("- full: full warns \\x1b\n- head: head warns \\x1b\n")
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    (folder / "report.html").unlink()
    assert launch.run_command(command(folder, **settings)) == 0
    assert "report: " not in capsys.readouterr().out


def test_a_finished_ladder_without_its_table(launch, trained, no_figures, tmp_path, capsys):
    small = {"ladder.strategies": "full", "ladder.seeds": 1, "ladder.fractions": "1"}
    folder = tmp_path / "ladder"
    assert launch.run_command(command(folder, **small)) == 0
    (folder / "ladder.md").unlink()
    assert launch.run_command(command(folder, **small)) == 2
    assert "metrics.json to have it written again" in capsys.readouterr().err


@pytest.mark.slow
def test_heads_of_two_seeds_interrupted_and_resumed(
    launch, digits, no_figures, tmp_path, monkeypatch, optax_promotion
):
    """The heads train as members of one program; one member is stopped with an epoch unsaved."""
    from medtl_jax.models.registry import create_model, initialize
    from medtl_jax.objectives.task import Task
    from medtl_jax.training import loop
    from medtl_jax.weights.pretrained import save_weights

    model, spec = create_model("lenet5", 4, in_chans=1)
    variables = initialize(model, 28, jax.random.key(0))
    read_as = dataclasses.replace(spec.input, mean=(127.5,), std=(127.5,), offset=False)
    spec = dataclasses.replace(spec, input=read_as)
    save_weights(tmp_path / "lenet.safetensors", variables, spec, Task("classify", tuple("abcd")))
    rng = np.random.default_rng(0)
    with np.load(tmp_path / "digits.npz") as found:
        arrays = dict(found)
    for split in ("train", "val", "test"):
        shape = arrays[f"{split}_images"].shape
        bright = 50 * arrays[f"{split}_labels"][:, :, None]
        arrays[f"{split}_images"] = (bright + rng.integers(0, 90, shape)).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", **arrays)
    settings = {
        "model.weights": tmp_path / "lenet.safetensors",
        "ladder.strategies": "head",
        "ladder.reference": "head",
        "ladder.fractions": "0.5",
        "train.epochs": 4,
        "train.min_steps": 0,
        "train.devices": 1,
        "transfer.cache_dir": tmp_path / "cache",
        "eval.drift": False,
    }
    write, lengths = loop.write_history, []

    def interrupted(path, history):
        lengths.append(len(history))
        # The first member has its third epoch, the second not.
        if lengths.count(3) == 2 and len(lengths) == 6:
            raise KeyboardInterrupt
        write(path, history)

    monkeypatch.setattr(loop, "write_history", interrupted)
    results = []
    for name, codes in (("stopped", (130, 0)), ("whole", (0,))):
        for code in codes:
            assert launch.run_command(command(tmp_path / name, **settings)) == code
        results.append(read(tmp_path / name, "ladder.json"))
        lengths.extend([0] * 10)
        assert "head: cached features are not augmented" in " ".join(results[-1]["notes"])
    stopped, whole = (result["levels"][0]["rungs"][0] for result in results)
    assert whole["cost"]["seconds"] > 0 and whole["cost"]["step_bytes"] > 0
    for metric, found in whole["test"].items():
        assert stopped["test"][metric]["by_seed"] == pytest.approx(found["by_seed"], abs=1e-6)
    assert len(set(whole["validation"])) == 2
    assert stopped["validation"] == pytest.approx(whole["validation"], abs=1e-5)
    first, second = (
        read_weights(tmp_path / name / "cells" / "head-50-1" / runs.WEIGHTS).tensors
        for name in ("stopped", "whole")
    )
    for name, tensor in second.items():
        np.testing.assert_allclose(first[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_real_ladder_interrupted_within_a_later_phase(
    launch, digits, no_figures, tmp_path, monkeypatch, optax_promotion
):
    from medtl_jax.training import loop

    settings = {
        "model.weights": "none",
        "ladder.strategies": "gradual",
        "ladder.reference": "gradual",
        "ladder.fractions": "1",
        "ladder.seeds": 1,
        "train.epochs": 6,
        "train.min_steps": 0,
        "data.batch_size": 20,
        "train.devices": 1,
        "eval.drift": False,
    }
    write, stops = loop.write_history, [3]

    def interrupted(path, history):
        # Of six epochs the second phase of gradual unfreezing has the third and fourth.
        if len(history) in stops:
            stops.clear()
            raise KeyboardInterrupt
        write(path, history)

    monkeypatch.setattr(loop, "write_history", interrupted)
    for name, codes in (("stopped", (130, 0)), ("whole", (0,))):
        for code in codes:
            assert launch.run_command(command(tmp_path / name, **settings)) == code
    stopped, whole = (read(tmp_path / name, "ladder.json") for name in ("stopped", "whole"))
    for found in (stopped, whole):
        assert found["levels"][0]["rungs"][0].pop("cost")["device_seconds"] > 0
    assert stopped == whole
    first, second = (
        (tmp_path / name / "cells" / "gradual-100-0" / "weights.safetensors").read_bytes()
        for name in ("stopped", "whole")
    )
    assert first == second
