"""One run over two processes: the numbers of one process, also after it was stopped or killed."""

import json
import shutil
import signal
import socket

import jax
import numpy as np
import process_runs
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from medtl_jax import distributed, process, runs
from medtl_jax.commands import report_mistake
from medtl_jax.errors import UserError
from medtl_jax.models.registry import create_model, variable_shapes
from medtl_jax.training.checkpoint import Checkpoints

RANKS = ("auc", "pr_auc")


@pytest.fixture(scope="module")
def begin(compilation_cache):
    """`begin(folder, count, **options)`, see `process_runs.start_run`."""

    def start(folder, count, **options):
        return process_runs.start_run(folder, count, cache=compilation_cache, **options)

    return start


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """`{processes: folder}` of the runs that nobody interrupts."""
    folders = {}
    for count in (1, 2):
        folders[count] = tmp_path_factory.mktemp("whole") / str(count)
        codes, outputs = process_runs.ended(begin(folders[count], count))
        assert codes == [0] * count, outputs
    return folders


def metrics(folder):
    found = json.loads((folder / "metrics.json").read_text())
    return {
        f"{split}/{name}": entry["value"]
        for split, entries in found.items()
        for name, entry in entries.items()
    }


def assert_same(folder, wanted):
    """The scores are alike to rounding, and so are the metrics."""
    with np.load(folder / "predictions.npz") as two, np.load(wanted / "predictions.npz") as one:
        for name in ("val_score", "test_score"):
            np.testing.assert_allclose(two[name], one[name], atol=1e-4)
    found, others = metrics(folder), metrics(wanted)
    assert found.keys() == others.keys()
    for name, value in found.items():
        assert (value is None) == (others[name] is None), name
        # Two images whose scores are as close as rounding change places: one of 90 pairs.
        apart = 0.012 if name.split("/")[1] in RANKS else 2e-4
        assert value is None or value == pytest.approx(others[name], abs=apart), name


@pytest.mark.slow
def test_two_processes_are_one_run(whole):
    assert_same(whole[2], whole[1])
    assert {path.name for path in whole[2].iterdir()} == {path.name for path in whole[1].iterdir()}
    with np.load(whole[2] / "predictions.npz") as two, np.load(whole[1] / "predictions.npz") as one:
        for split, count in (("val", 22), ("test", 21)):
            assert len(set(two[f"{split}_id"].tolist())) == len(two[f"{split}_id"]) == count
            assert two[f"{split}_id"].tolist() == one[f"{split}_id"].tolist()
    environment = json.loads((whole[2] / "environment.json").read_text())
    assert environment["processes"] == 2 and len(environment["devices"]) == 4


@pytest.mark.slow
def test_two_processes_that_were_stopped_and_killed_end_alike(begin, whole, tmp_path):
    folder = tmp_path / "run"
    stopped = begin(folder, 2, pause=0.5)
    process_runs.wait_for_epochs(folder, stopped, 1)
    # One of them is told, and both stop at the same step.
    stopped[1].send_signal(signal.SIGTERM)
    codes, outputs = process_runs.ended(stopped)
    assert codes == [143, 143], outputs
    assert (
        outputs[0].splitlines()[-1]
        == "stopped by SIGTERM; the same command continues or repeats the run"
    )

    killed = begin(folder, 2, pause=0.5)
    process_runs.wait_for_epochs(folder, killed, 2)
    killed[1].kill()
    codes, outputs = process_runs.ended(killed)
    assert codes == [2, -signal.SIGKILL], outputs
    assert "the same command on all of them continues the run" in outputs[0]
    codes, outputs = process_runs.ended(begin(folder, 2))
    assert codes == [0, 0], outputs
    with (
        np.load(folder / "predictions.npz") as found,
        np.load(whole[2] / "predictions.npz") as wanted,
    ):
        for name in wanted.files:
            assert found[name].tobytes() == wanted[name].tobytes(), name
    assert metrics(folder) == metrics(whole[2])


@pytest.mark.slow
def test_one_process_reads_what_two_have_written(whole):
    folder = whole[2]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epoch = min(history, key=lambda record: record["val_loss"])["epoch"]
    network, _ = create_model("lenet5_bn", 4, in_chans=1)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore_best(epoch, variable_shapes(network, 32))
    wanted = load_file(folder / "weights.safetensors")
    read = {"/".join(path): leaf for path, leaf in flatten_dict(found).items()}
    assert read.keys() == wanted.keys()
    for name, leaf in read.items():
        np.testing.assert_array_equal(leaf, wanted[name])


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_has_written(begin, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    for name in ("metrics.json", "predictions.npz", "metrics.jsonl"):
        (folder / name).unlink()
    codes, outputs = process_runs.ended(begin(folder, 2))
    assert codes == [0, 0], outputs
    assert "continuing after epoch 3" in outputs[0]
    assert_same(folder, whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_never_arrives_is_one_line(process, compilation_cache, tmp_path):
    flags = [
        f"--coordinator=127.0.0.1:{process_runs.free_port()}",
        "--processes=2",
        f"--process={process}",
        "--wait=2",
    ]
    alone = process_runs.start(
        ["--config=configs/finetune.py", f"--workdir={tmp_path / 'run'}", *flags],
        devices=1,
        cache=compilation_cache,
    )
    (code,), (output,) = process_runs.ended([alone])
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith("error: not all of the 2 processes have met at 127.0.0.1:")
    assert "after 2 s" in line and "--wait" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_two_commands_are_not_one_run(compilation_cache, tmp_path):
    shared = [
        "--config=configs/finetune.py",
        *(f"--config.{key}={value}" for key, value in process_runs.SETTINGS.items()),
        f"--coordinator=127.0.0.1:{process_runs.free_port()}",
        "--processes=2",
        "--wait=200",
    ]
    codes, outputs = process_runs.ended(
        [
            process_runs.start(
                [*shared, f"--process={number}", f"--workdir={tmp_path / str(number)}", *other],
                devices=2,
                cache=compilation_cache,
            )
            for number, other in enumerate(([], ["--config.seed=7"]))
        ]
    )
    assert codes == [2, 2], outputs
    said = "process 1 has another config.seed, --workdir than process 0; start all processes"
    for output in outputs:
        (line,) = [line for line in output.splitlines() if "error" in line]
        assert line.startswith("error: ") and said in line and "Traceback" not in output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("taken", [True, False])
def test_a_port_in_use_is_refused_before_jax_opens_it(monkeypatch, taken):
    opened = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: opened.append(args))
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        if taken:
            with pytest.raises(UserError, match=rf"--coordinator={where} .* name another port"):
                distributed._initialize(distributed.Meeting(where, 2, 0))
            # Process 1 is perhaps on the same host, where process 0 has the port.
            distributed._initialize(distributed.Meeting(where, 2, 1))
            assert opened == [(where, 2, 1)]
    if not taken:
        distributed._initialize(distributed.Meeting(where, 2, 0))
        assert opened == [(where, 2, 0)]


class Store:
    """The processes' key-value store, to which process 1 says what process 0 does, or `change`."""

    def __init__(self, change=lambda facts: facts):
        self._change, self._values = change, {}

    def key_value_set(self, key, value, allow_overwrite=False):
        del allow_overwrite
        self._values[key] = value

    def key_value_dir_get(self, folder):
        return [item for item in self._values.items() if item[0].startswith(f"{folder}/")]

    def wait_at_barrier(self, place, milliseconds):
        del milliseconds
        facts = json.loads(self._values[f"{place}/0"])
        self._values[f"{place}/1"] = json.dumps(self._change(facts))


@pytest.fixture
def store(monkeypatch):
    """`store(store)` makes this process the first of two, which meet in that store."""

    def use(store):
        monkeypatch.setattr(distributed, "_client", lambda: store)
        monkeypatch.setattr(distributed, "spans", lambda: True)

    return use


CONFIG = {"experiment": "finetune", "seed": 0, "data": {"dir": "", "name": "phantom"}}
ENVIRONMENT = {"data_sha256": "aa", "weights_sha256": "bb"}


@pytest.mark.parametrize(
    "other",
    [
        {"config.seed": "1"},
        {"config.data.name": "'folder'"},
        {"--workdir": "/elsewhere"},
        {"data": "ab"},
        {"weights": "ba"},
        {"config.seed": "1", "weights": "ba"},
    ],
)
def test_what_differs_between_the_processes_is_named(store, tmp_path, other):
    store(Store(lambda facts: {**facts, **other}))
    with pytest.raises(UserError) as caught:
        runs.open_folder(tmp_path / "run", CONFIG, ENVIRONMENT)
    assert str(caught.value) == (
        f"process 1 has another {', '.join(other)} than process 0; start all processes with the "
        "same command, data and weights"
    )
    assert not any(tmp_path.iterdir())


def test_what_differs_is_named_before_anything_is_computed(launch, store, monkeypatch, tmp_path):
    from configs import default
    from experiments import finetune

    monkeypatch.setattr(finetune, "run", lambda request: pytest.fail("it has begun"))
    store(Store(lambda facts: {**facts, "config.seed": "1"}))
    with pytest.raises(UserError, match=r"^process 1 has another config\.seed than process 0"):
        launch._run_experiment(
            default.get_config().to_dict(), set(), str(tmp_path / "run"), ["launch.py"]
        )
    assert not any(tmp_path.iterdir())


def test_processes_alike_open_the_folder(store, tmp_path):
    store(Store())
    runs.open_folder(tmp_path / "run", CONFIG, ENVIRONMENT)
    assert runs.read_json(tmp_path / "run" / runs.CONFIG) == CONFIG


def test_a_process_at_its_end_is_not_one_that_begins(store, tmp_path):
    store(Store(lambda facts: {"the end": ""}))
    with pytest.raises(UserError, match="process 1 is at another part of the program"):
        runs.open_folder(tmp_path / "run", CONFIG, ENVIRONMENT)
    with pytest.raises(UserError, match="process 1 is at another part of the program"):
        distributed.meet()


def leave_with(error):
    def leave(watch):
        watch.stop()
        if error is not None:
            raise error

    return leave


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: Barrier failed"), "another process is gone"),
        (UserError("process 1 is at another part"), "process 1 is at another part"),
    ],
)
@pytest.mark.parametrize("inside", [None, process.Preempted()])
def test_a_failure_to_leave_is_one_line(monkeypatch, store, capsys, error, said, inside):
    def quit_(code, line=""):
        assert not line
        raise SystemExit(code)

    used = Store()
    used.key_value_dir_get = lambda folder: ["", ""] if folder == distributed._SEEN else []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_connect", lambda meeting: None)
    monkeypatch.setattr(distributed, "_leave", leave_with(error))
    monkeypatch.setattr(distributed, "_quit", quit_)
    store(used)
    with (
        pytest.raises(SystemExit) as ended,
        distributed.joined(distributed.Meeting(), report_mistake),
    ):
        if inside is not None:
            raise inside
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("inside", [None, process.Preempted()])
def test_a_process_writes_again_when_it_has_left_the_others(monkeypatch, store, inside):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "_connect", lambda meeting: None)
    monkeypatch.setattr(distributed, "_leave", leave_with(None))
    store(Store())
    left = []
    try:
        with distributed.joined(distributed.Meeting(), report_mistake):
            assert not process.is_writer()
            if inside is not None:
                raise inside
    except process.Preempted as error:
        left.append(error)
    assert left == ([] if inside is None else [inside])
    assert process.is_writer()
