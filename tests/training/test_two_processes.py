"""Two processes as one program: each reads its rows, and the failure of one ends both."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.training import devices
from medtl_jax.training.devices import data_mesh

FOLDER = pathlib.Path(__file__).resolve().parent


def test_one_process_has_all_rows():
    mesh = data_mesh(4)
    assert mesh.own_rows(8) == slice(0, 8)
    batch = {"image": np.arange(8.0)}
    for placed in (mesh.place(batch, mesh.batched), mesh.place_rows(batch, 8)):
        assert placed["image"].sharding == mesh.batched
        np.testing.assert_array_equal(placed["image"], batch["image"])


def test_all_devices_of_several_processes_compute(monkeypatch):
    monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
    assert data_mesh(4).mesh.devices.size == data_mesh(0).mesh.devices.size == len(jax.devices())
    with pytest.raises(UserError, match=r"train.devices=2, but 2 processes have 4 devices"):
        data_mesh(2)


@pytest.mark.slow
def test_each_process_reads_its_rows_and_the_failure_of_one_ends_both(compilation_cache):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    if compilation_cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = compilation_cache
    processes = [
        subprocess.Popen(
            [sys.executable, FOLDER / "two_processes.py", str(port), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    found = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], found
    for number, (output, _) in enumerate(found):
        assert f"process {number} read 12 of 24 rows" in output, found
    assert found[0][1].splitlines()[-1] == "error: this folder is taken"
    assert found[1][1].splitlines()[-1] == "error: process 0 has ended: this folder is taken"
