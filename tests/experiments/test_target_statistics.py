"""The batch statistics that a target's images meet, in whole runs and before their first step."""

import types

import jax
import numpy as np
import pytest
from adapted_runs import DANN, SMALL, adapted, other_digits, write_target
from digit_runs import checkpoint, history, make_request, run, scores, stopped_at, tensors

from medtl_jax.models.norms import domain_key
from medtl_jax.models.registry import create_model

pytestmark = pytest.mark.usefixtures("small_runs")

ADABN = {"domain__bn": "adabn", "domain__select": "source"}
OWN = domain_key(1)


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """A target of no whole number of batches."""
    return write_target(tmp_path_factory.mktemp("fifty") / "target.npz", train=50)


@pytest.fixture(scope="module")
def adabn(five, fifty, tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("adabn") / "run", five, fifty, **ADABN)


def check_first_norm(mean, var, images, kernel, bias):
    """The statistics are those of what the first norm reads of all `images`, in float64."""
    _, spec = create_model("lenet5_bn", 5)
    x = (images[..., None].astype(np.float64) - spec.input.mean[0]) / spec.input.std[0]
    x = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))[..., 0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), (1, 2))
    maps = np.einsum("nijab,abk->nijk", windows, np.asarray(kernel, np.float64)[:, :, 0])
    np.testing.assert_allclose(mean, maps.mean((0, 1, 2)) + bias, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(var, maps.var((0, 1, 2)), rtol=1e-3)


def test_adabn_is_statistics_of_the_target_worked_out_by_hand(adabn, five, tmp_path):
    folder = run(tmp_path / "plain", five, None, model__name="lenet5_bn", model__weights="none")
    found, source = tensors(adabn), tensors(folder)
    for name, array in source.items():
        moved = name.startswith("batch_stats/")
        assert np.array_equal(found[name], array) == (not moved), name
    norm = (found[f"batch_stats/stem/conv/norm/{name}"] for name in ("mean", "var"))
    first = (source[f"params/stem/conv/conv/{name}"] for name in ("kernel", "bias"))
    check_first_norm(*norm, other_digits(50, 70)[0], *first)


def test_an_interrupted_adabn_run_goes_on_to_the_same_end(adabn, five, fifty, tmp_path):
    with stopped_at(2):
        adapted(tmp_path / "run", five, fifty, **ADABN)
    folder = adapted(tmp_path / "run", five, fifty, **ADABN)
    assert history(folder) == history(adabn) and len(history(folder)) == 2
    pairs = [(checkpoint(one, "last", 2), tensors(one)) for one in (folder, adabn)]
    for found, wanted in zip(*pairs, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    np.testing.assert_array_equal(scores(folder), scores(adabn))


def at_start(folder, five, target, **settings):
    """What a run would be evaluated with before its first step, and what it has said by then."""
    from experiments.prepared import prepare

    keys = {"model__weights": "none", **SMALL, "train__ema": 0.0, **settings}
    request = make_request(folder, five, None, **keys, domain__target__dir=target)
    made = prepare(request)
    return made.training.evaluated(made.state), request.console.lines


def test_adabn_is_the_same_on_one_device_and_on_four(five, fifty, tmp_path):
    one, four = (
        at_start(tmp_path, five, fifty, **ADABN, train__devices=count)[0]["batch_stats"]
        for count in (1, 4)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    norm = one["stem"]["conv"]["norm"]
    assert not np.allclose(norm[OWN]["mean"], norm["mean"])


@pytest.mark.parametrize("asked", [{"train__swa": 0.5}, {"transfer__bn__high": "reestimate"}])
def test_exact_statistics_are_those_of_each_domain(asked, five, fifty, tmp_path):
    groups = {"transfer__groups__low": "stage1", "transfer__groups__high": "stem,features,head"}
    settings = {"domain__bn": "own", "transfer__bn__low": "stats", **groups, **asked}
    found, said = at_start(tmp_path, five, fifty, **settings)
    layer, norm = found["params"]["stem"]["conv"], found["batch_stats"]["stem"]["conv"]["norm"]
    first = layer["conv"]["kernel"], layer["conv"]["bias"]
    with np.load(five) as source:
        check_first_norm(norm["mean"], norm["var"], source["train_images"], *first)
    check_first_norm(norm[OWN]["mean"], norm[OWN]["var"], other_digits(50, 70)[0], *first)
    # What uses its stored statistics keeps them, and that is said.
    own = found["batch_stats"]["stage1"]["conv"]["norm"][OWN]
    assert np.all(own["mean"] == 0) and np.all(own["var"] == 1)
    assert [line for line in said if "in stage1 the target has no batch statistics of its" in line]


SOME = {"transfer__groups__high": "stage1,features,head"}
ONLY_HEAD = {"transfer__groups__frozen": "stem,stage1,features", "transfer__groups__high": "head"}


@pytest.mark.parametrize(
    ("settings", "bn", "kept"),
    [
        ({}, "own", ""),
        ({"transfer__bn__high": "renorm"}, "own", ""),
        ({"transfer__groups__low": "stem", "transfer__bn__low": "stats", **SOME}, "own", "stem"),
        ({"transfer__groups__frozen": "stem", **SOME}, "own", "stem"),
        ({"transfer__bn__high": "stats"}, "source", ""),
        ({"transfer__strategy": "lpft"}, "source", ""),
        (ONLY_HEAD, "source", ""),
        ({"domain__bn": "adabn", **ONLY_HEAD}, "adabn", ""),
    ],
)
def test_where_the_target_has_statistics_of_its_own(settings, bn, kept, tmp_path):
    from experiments import adaptation

    keys = {"model__weights": "none", **DANN, **settings}
    config = make_request(tmp_path, tmp_path / "x.npz", None, **keys).config
    assert config["domain"]["bn"] == bn
    half = types.SimpleNamespace(spec=types.SimpleNamespace(name="x"))
    domains = types.SimpleNamespace(source=half, target=half, scored=())
    lines = adaptation.reading(config, domains), adaptation.reading_of_evaluation(config)
    said = [line for part in lines for line in part if line.startswith("Batch statistics")]
    assert len(said) == (0 if bn == "source" else 2)
    for line in said:
        assert ("except in" in line) == bool(kept)
        assert line.endswith(
            f"except in {kept}, where those of before the training stay." * bool(kept)
        )
