"""TensorBoard event files of a run, readable without TensorFlow.

`<run>/tensorboard/training` gets the scalars of each epoch as it ends, `<run>/tensorboard/final`
the metrics of every split; the figures are in the report. Show them with
`tensorboard --logdir <run>/tensorboard`.
"""

import contextlib
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from medtl_jax.errors import UserError
from medtl_jax.report.tables import printable

TRAINING, FINAL = "training", "final"
# Where the scalars of an epoch go, by the first part of their key.
_GROUPS = {
    "train_": "train/",
    "val_": "val/",
    "lr_": "learning_rate/",
    "gradient_norm_": "gradient_norm/",
}
_PLACES = ("epoch", "step")


class EventWriter:
    """Appends scalars of epochs to the event files of a run, each at once and in this thread.

    Args:
      folder: the run's `tensorboard` folder; made where missing.
      purge_step: after a resume, the first step that will be written: what an earlier process
        wrote from that step on is not shown any more. None: nothing of it is.

    Raises:
      UserError: the file cannot be written; from every method.
    """

    def __init__(self, folder: pathlib.Path | str, purge_step: int | None = None):
        self._file = _File(pathlib.Path(folder) / TRAINING)
        log = SessionLog(status=SessionLog.START)
        self._file.add([Event(wall_time=time.time(), step=purge_step or 0, session_log=log)])

    def epoch(self, record: Mapping[str, object]) -> None:
        """Writes one record of the history, at its `step`; values that are None are left out."""
        self._file.add(_events(_scalars(record), int(record["step"])))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def write_metrics(
    folder: pathlib.Path | str,
    metrics: Mapping[str, Mapping[str, dict]],
    step: int = 0,
) -> None:
    """Writes the metrics `<split>/<metric>` of a finished run, in the place of older ones.

    Args:
      folder: the run's `tensorboard` folder.
      metrics: the content of `metrics.json`; undefined values are left out.
      step: of the last update.

    Raises:
      UserError: the file cannot be written.
    """
    place = pathlib.Path(folder) / FINAL
    with _as_user_error(place):
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
    values = {
        f"{split}/{name}": entry["value"]
        for split, entries in metrics.items()
        for name, entry in entries.items()
        if entry["value"] is not None
    }
    file = _File(place)
    file.add(_events(values, step))
    file.close()


def _scalars(record: Mapping[str, object]) -> dict[str, float]:
    """`{tag: value}` of the numbers of an epoch: `val/auc`, `learning_rate/high`, `seconds`, ..."""
    found = {}
    for key, value in record.items():
        if key in _PLACES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        prefix = next((prefix for prefix in _GROUPS if key.startswith(prefix)), "")
        found[_GROUPS.get(prefix, "") + key.removeprefix(prefix)] = float(value)
    return found


def _events(values: Mapping[str, float], step: int) -> list[Event]:
    # A class may be named with characters that a protocol buffer refuses.
    summaries = [
        Summary.Value(tag=printable(tag), simple_value=value) for tag, value in values.items()
    ]
    return [Event(wall_time=time.time(), step=step, summary=Summary(value=summaries))]


class _File:
    """One event file, written at once: the thread of tensorboardX loses a full disk's error."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        with _as_user_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The name holds the second only: a run resumed at once must not write over it.
            number = len(list(folder.glob("events.out.tfevents.*")))
            self._writer = EventsWriter(str(folder / "events"), f".{number}")

    def add(self, events: Iterable[Event]) -> None:
        with _as_user_error(self._folder):
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        with _as_user_error(self._folder):
            self._writer.close()


@contextlib.contextmanager
def _as_user_error(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free some space or choose another --workdir"
        ) from error
