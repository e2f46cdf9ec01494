"""Features that are kept: probes and neighbours, LP-FT, cached prefixes, members of one program."""

import math
import shutil

import numpy as np
import pytest
from digit_runs import (
    ROOT,
    history,
    initial,
    make_request,
    run,
    scores,
    stopped_at,
    tensors,
    write_digits,
)

from medtl_jax import runs

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def first(five, tmp_path_factory):
    """A LeNet that has seen other pictures of these digits."""
    data = write_digits(tmp_path_factory.mktemp("other") / "digits.npz", 5, seed=3)
    return run(tmp_path_factory.mktemp("first") / "run", data, "none", train__epochs=3)


@pytest.fixture(scope="module")
def probed(five, first, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "run"
    return run(folder, five, first, transfer__strategy="probe")


def evaluated(launch, folder, data, out):
    """The exit code of scoring a run on its own test split through the command line."""
    keys = {
        "experiment": "evaluate",
        "eval.run": folder,
        "eval.batch_size": 16,
        "eval.resamples": 20,
        "data.name": "npz",
        "data.dir": data,
        "train.devices": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    study = f"--config={ROOT / 'configs' / 'default.py'}"
    return launch.run_command(["launch.py", study, *flags, f"--workdir={out}"])


# ---- probes and neighbours ---------------------------------------------------------------------


def test_a_probe_is_the_head_of_a_network_like_any_other(
    launch, no_pictures, probed, five, first, tmp_path
):
    assert evaluated(launch, probed, five, tmp_path / "scored") == 0
    own, found = (runs.read_json(run / runs.METRICS) for run in (probed, tmp_path / "scored"))
    assert found["test"] == own["test"] and own["test"]["accuracy"]["value"] > 0.5
    np.testing.assert_array_equal(scores(tmp_path / "scored"), scores(probed))
    before, after = tensors(first), tensors(probed)
    for name, array in before.items():
        assert np.array_equal(after[name], array) == (name.split("/")[1] != "head"), name
    (record,) = history(probed)
    assert record["epoch"] == 1 and record["penalty"] > 0

    # Its head is kept on demand; at this rate nothing moves.
    keys = {"model__keep_head": True, "train__epochs": 1, "optim__high__lr": 1e-30}
    keys |= {"optim__low__lr": 1e-30, "optim__low__weight_decay": 0.0}
    keys |= {"optim__high__weight_decay": 0.0, "train__ema": 0.0}
    tuned = run(tmp_path / "tuned", five, probed, **keys)
    np.testing.assert_array_equal(tensors(tuned)["params/head/kernel"], after["params/head/kernel"])
    np.testing.assert_allclose(scores(tuned), scores(probed), rtol=1e-5, atol=1e-7)


def test_fine_tuning_begins_with_the_probe(probed, five, first, tmp_path):
    keys = {"transfer__strategy": "lpft", "train__epochs": 2}
    with stopped_at(2):
        run(tmp_path / "tuned", five, first, **keys)
    begun, probe = initial(tmp_path / "tuned"), tensors(probed)
    for name, array in probe.items():
        np.testing.assert_array_equal(begun[name], array)
    whole = run(tmp_path / "whole", five, first, **keys)
    resumed = run(tmp_path / "tuned", five, first, **keys)
    assert history(resumed) == history(whole)
    np.testing.assert_array_equal(scores(resumed), scores(whole))
    assert not np.array_equal(tensors(whole)["params/head/kernel"], probe["params/head/kernel"])


def test_neighbours_have_scores_and_no_network_to_evaluate(
    launch, no_pictures, five, first, tmp_path, capfd
):
    folder = run(tmp_path / "knn", five, first, transfer__strategy="knn")
    metrics = runs.read_json(folder / runs.METRICS)
    assert metrics["test"]["accuracy"]["value"] > 0.5
    assert not (folder / runs.WEIGHTS).exists() and history(folder)[0]["neighbours"] >= 1
    found = scores(folder)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    capfd.readouterr()
    assert evaluated(launch, folder, five, tmp_path / "scored") == 2
    message = capfd.readouterr().err
    assert message.startswith(f"error: {folder}: a k-NN run has no network to evaluate")
    assert message.count("\n") == 1 and not (tmp_path / "scored").exists()


# ---- a cached prefix ---------------------------------------------------------------------------

PREFIX = {
    "transfer__groups__frozen": "stem,stage1",
    "transfer__groups__low": "features",
    "transfer__groups__high": "head",
    "train__epochs": 2,
}


def assert_close(found, wanted, tolerance=1e-4):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = (
            {k: v for k, v in record.items() if not k.endswith("_bytes")}
            for record in (ours, theirs)
        )
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_cached_prefix_trains_what_the_whole_network_does(
    launch, no_pictures, five, first, tmp_path, frozen
):
    """The rest begins with a convolution, or with the layers of the features."""
    stages = ("stem", "stage1", "features")
    keys = {
        **PREFIX,
        "transfer__groups__frozen": ",".join(stages[:frozen]),
        "transfer__groups__low": ",".join(stages[frozen:]),
        "eval__drift": False,
    }
    whole = run(tmp_path / "whole", five, first, **keys)
    cached = run(tmp_path / "cached", five, first, transfer__cache="prefix", **keys)
    assert_close(history(cached), history(whole))
    np.testing.assert_allclose(scores(cached), scores(whole), rtol=1e-3, atol=1e-5)
    before, after = tensors(first), tensors(cached)
    for name, array in after.items():
        kept = name.split("/")[1] in stages[:frozen]
        assert np.array_equal(array, before[name]) == kept, name
    if frozen == 2:
        assert evaluated(launch, cached, five, tmp_path / "scored") == 0
        own, found = (runs.read_json(run / runs.METRICS) for run in (cached, tmp_path / "scored"))
        assert found["test"] == own["test"]


def test_a_cached_run_is_resumed_with_its_views_also_where_the_cache_is_gone(five, first, tmp_path):
    keys = {**PREFIX, "transfer__cache": "prefix", "transfer__views": 2, "augment__shift": 0.1}
    whole = run(tmp_path / "whole", five, first, **keys)
    cache = tmp_path / "cache"
    with stopped_at(2):
        run(tmp_path / "halved", five, first, **keys, transfer__cache_dir=str(cache))
    assert any(cache.iterdir())
    shutil.rmtree(cache)
    halved = run(tmp_path / "halved", five, first, **keys, transfer__cache_dir=str(cache))
    assert history(halved) == history(whole)
    np.testing.assert_array_equal(scores(halved), scores(whole))


# ---- members of one program --------------------------------------------------------------------


def test_the_seeds_of_a_head_train_as_one_program(five, first, tmp_path, monkeypatch):
    from experiments import finetune

    calls = []
    together = finetune.fit_members
    monkeypatch.setattr(
        finetune,
        "fit_members",
        lambda trainings, *others: calls.append(len(trainings)) or together(trainings, *others),
    )

    def requests(name, seeds):
        keys = {"transfer__strategy": "head", "transfer__views": 2, "train__epochs": 3}
        keys |= {"augment__shift": 0.1, "eval__drift": False}
        return [
            make_request(tmp_path / f"{name}{seed}", five, first, seed=seed, **keys)
            for seed in seeds
        ]

    for request in requests("alone", (0, 1)):
        finetune.run(request)
    assert calls == []
    with stopped_at(2):
        finetune.run_all(requests("member", (0, 1)))
    finetune.run_all(requests("member", (0, 1, 2)))
    assert calls == [2, 3]
    for seed in (0, 1):
        alone, member = tmp_path / f"alone{seed}", tmp_path / f"member{seed}"
        assert_close(history(member), history(alone), 1e-5)
        np.testing.assert_allclose(scores(member), scores(alone), rtol=1e-4, atol=1e-6)
        wanted, found = (runs.read_json(run / runs.METRICS)["test"] for run in (alone, member))
        assert found.keys() == wanted.keys()
        for name, entry in wanted.items():
            values = [math.nan if e["value"] is None else e["value"] for e in (entry, found[name])]
            assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-5, nan_ok=True), name
    others = [scores(tmp_path / f"member{seed}") for seed in (0, 1, 2)]
    assert not np.allclose(others[0], others[1], rtol=1e-3)
    # What has ended is not trained again.
    finetune.run_all(requests("member", (0, 1)))
    assert calls == [2, 3]
