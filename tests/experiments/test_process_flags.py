"""The flags that make several processes one run, and what such a run does not do."""

import jax
import pytest

from configs import default
from experiments.settings import check_processes
from medtl_jax import process
from medtl_jax.errors import UserError

WHERE = ("--coordinator=host:1234", "--processes=2", "--process=1")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (WHERE[:2], "--process missing: --coordinator=HOST:PORT, --processes=N and --process=I"),
        (WHERE[2:], "--coordinator, --processes missing"),
        (("--coordinator=host", *WHERE[1:]), "--coordinator=host is not HOST:PORT"),
        (("--coordinator=host:0", *WHERE[1:]), "--coordinator=host:0 is not HOST:PORT"),
        (("--coordinator=host:65536", *WHERE[1:]), "with a port from 1 to 65535"),
        (("--process=2", *WHERE[:2]), "--process=2 of --processes=2: they are numbered from 0"),
        (("--process=-1", *WHERE[:2]), "--process=-1 of --processes=2"),
        (("--processes=two", WHERE[0], WHERE[2]), "--processes=two"),
        (("--distributed", WHERE[0]), "--distributed finds by itself what --coordinator"),
        (("--wait=5",), "--wait is for --coordinator or --distributed"),
        (("--wait=0", *WHERE), "--wait=0 must be more than 0 and at most 86400 seconds"),
        (("--wait=nan", *WHERE), "--wait=nan must be more than 0"),
        (("--wait=inf", *WHERE), "--wait=inf must be more than 0 and at most 86400 seconds"),
        (("--wait=86401", "--distributed"), "--wait=86401 must be more than 0 and at most 86400"),
    ],
)
def test_wrong_flags_are_one_line(launch, capsys, flags, said):
    assert launch.run_command(["launch.py", "--config=configs/finetune.py", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experiment": "ladder"}, "experiment=ladder is not run by several processes as one"),
        ({"transfer.cache": "prefix"}, "transfer.cache=prefix is for one process"),
        ({"transfer.probe_first": True}, "transfer.probe_first=True is for one process"),
        ({"eval.corruptions": True}, "eval.corruptions=True is for one process"),
        ({"experiment": "evaluate", "eval.tta": 4}, "eval.tta=4 is for one process"),
    ],
)
def test_what_is_for_one_process_is_refused(settings, said):
    config = default.get_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=said):
        check_processes(config.to_dict())


def test_what_several_processes_do_is_not_refused():
    config = default.get_config()
    for settings in ({}, {"experiment": "evaluate"}, {"experiment": "predict", "eval.tta": 4}):
        config.update_from_flattened_dict(settings)
        check_processes(config.to_dict())


@pytest.mark.parametrize("study", ["ensemble", "ablation"])
def test_processes_with_runs_of_their_own_do_not_meet(launch, monkeypatch, capsys, study):
    """Nobody is at the coordinator's."""
    told = []
    monkeypatch.setattr(
        launch, "_run_experiment", lambda config, *others: told.append(process.sharers())
    )
    flags = [f"--config=configs/{study}.py", "--config.seed=3"]
    assert launch.run_command(["launch.py", *flags, *WHERE]) == 0
    assert launch.run_command(["launch.py", *flags]) == 0
    assert told == [2, 1] and process.sharers() == 1
    assert launch.run_command(["launch.py", *flags, "--distributed"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"experiment={study} is shared by processes of their own: give each the same" in line
    assert "without --distributed" in line and len(told) == 2
    assert launch.run_command(["launch.py", *flags, *WHERE, "--wait=5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--wait is for processes that meet, and those of experiment={study} do not" in line
    assert len(told) == 2


def test_a_host_of_a_slice_computes_with_the_others(launch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    run = tmp_path / "run"
    assert (
        launch.run_command(["launch.py", "--config=configs/finetune.py", f"--workdir={run}"]) == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "those of 4 hosts" in line and "with --distributed" in line
    assert not run.exists()
