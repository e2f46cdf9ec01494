import errno
import struct

import pytest
from report_tasks import epochs
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from medtl_jax.errors import UserError
from medtl_jax.report.tensorboard import EventWriter, write_metrics


def crc32c(data):
    """CRC-32 with the Castagnoli polynomial (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unmasked(masked):
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def read(folder):
    """Every event of a folder's files in the order TensorBoard reads them, checksums checked."""
    events = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            body = data[place + 12 : place + 12 + size]
            for part, at in ((data[place : place + 8], place + 8), (body, place + 12 + size)):
                assert unmasked(struct.unpack_from("<I", data, at)[0]) == crc32c(part)
            events.append(Event.FromString(body))
            place += size + 16
    return events


def scalars(events):
    """`{(tag, step): value}`, as TensorBoard shows it: a start purges what lies after it."""
    found = {}
    for event in events:
        if event.session_log.status == SessionLog.START:
            found = {key: value for key, value in found.items() if key[1] < event.step}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found[value.tag, event.step] = value.simple_value
    return found


def test_the_checksum_of_this_test_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283


def test_epochs_are_readable_as_soon_as_they_are_written(tmp_path):
    with EventWriter(tmp_path / "tensorboard") as writer:
        writer.epoch(epochs()[0])
        events = read(tmp_path / "tensorboard" / "training")
        assert events[0].file_version == "brain.Event:2"
        found = scalars(events)
        assert {tag for tag, _ in found} == {
            "train/loss", "val/loss", "val/accuracy", "val/mae", "learning_rate/low",
            "learning_rate/high", "gradient_norm/low", "seconds", "images_per_second",
        }  # fmt: skip
        assert found["val/accuracy", 10] == 0.5
        writer.epoch(epochs()[1])
        found = scalars(read(tmp_path / "tensorboard" / "training"))
    # The AUC of the first epoch was undefined.
    assert ("val/auc", 10) not in found and found["val/auc", 20] == pytest.approx(0.9)


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    with EventWriter(tmp_path) as writer:
        for record in epochs(3):
            writer.epoch(record)
    # Killed after epoch 3, whose checkpoint is missing: steps 21 to 30 come again.
    with EventWriter(tmp_path, purge_step=21) as writer:
        writer.epoch(epochs(3)[2] | {"val_accuracy": 0.25})
    # Both processes may start within one second.
    assert len(list((tmp_path / "training").iterdir())) == 2
    found = scalars(read(tmp_path / "training"))
    shown = {step: value for (tag, step), value in found.items() if tag == "val/accuracy"}
    assert shown == {10: 0.5, 20: pytest.approx(0.6), 30: 0.25}


def test_a_run_that_starts_again_shows_nothing_of_the_one_before(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.epoch(epochs()[0])
    EventWriter(tmp_path).close()
    assert scalars(read(tmp_path / "training")) == {}


def test_final_metrics(tmp_path):
    metrics = {
        "val": {"auc": {"value": 0.5, "ci95": None, "n": 4}},
        "test": {
            "auc": {"value": 0.75, "ci95": None, "n": 4},
            "auc/\udcff": {"value": 0.25, "ci95": None, "n": 4},
            "f1": {"value": None, "ci95": None, "n": 4, "reason": "no image"},
        },
    }
    # The second call takes the place of the first.
    for step in (30, 40):
        write_metrics(tmp_path, metrics, step)
    events = read(tmp_path / "final")
    assert scalars(events) == {
        ("val/auc", 40): 0.5,
        ("test/auc", 40): 0.75,
        ("test/auc/\\udcff", 40): 0.25,
    }


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (EventWriter, lambda folder: write_metrics(folder, {})):
        with pytest.raises(UserError, match=r"cannot write .*file.*; free some space or .*workdir"):
            write(tmp_path / "file")


def test_a_full_disk_is_one_line_while_training(tmp_path, monkeypatch):
    writer = EventWriter(tmp_path)

    def full(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.raises(UserError, match=r"cannot write .*training: No space left on device"):
        writer.epoch(epochs()[0])
    writer.close()
