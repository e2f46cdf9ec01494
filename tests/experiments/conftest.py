"""The command line in this process, which it may not change."""

import contextlib
import pathlib

import digit_runs
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launch():
    """The module `launch`, in a process that it may not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        import launch

        patch.setattr(launch, "prepare_xla", lambda: None)
        patch.setattr(launch, "keep_freed_memory", lambda: None)
        yield launch


@contextlib.contextmanager
def _without_pictures():
    """Runs draw no figures and write no report: half of the time, the subject of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from experiments import reporting

        patch.setattr(reporting, "explain", lambda *args: None)
        patch.setattr(reporting, "draw_figures", lambda *args: {})
        patch.setattr(reporting, "draw_sheet", lambda *args: None)
        patch.setattr(reporting, "save_figures", lambda *args: None)
        patch.setattr(reporting, "write_report", lambda path, **content: None)
        yield


@pytest.fixture(scope="module")
def no_pictures():
    """The runs of a module draw no pictures."""
    with _without_pictures():
        yield


@pytest.fixture
def no_pictures_here():
    """The runs of one test draw no pictures."""
    with _without_pictures():
        yield


@pytest.fixture(scope="module")
def small_runs():
    """The process of a module of small runs on digits, see `digit_runs.small_process`."""
    with digit_runs.small_process():
        yield


@pytest.fixture(scope="module")
def five(small_runs, tmp_path_factory):
    """Digits 0 to 4, which most weights of these tests were trained on."""
    return digit_runs.write_digits(tmp_path_factory.mktemp("five") / "digits.npz", 5, seed=1)
