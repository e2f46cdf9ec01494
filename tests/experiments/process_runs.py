"""The command line in processes of its own, without pictures: one, or several that are one run.

Run as a script it is such a process: its arguments are those of launch.py.
"""

import importlib
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Seconds that a process pauses after each step, so that a test can interrupt it at one.
PAUSE = "MEDTL_JAX_TEST_PAUSE"
SETTINGS = {
    "model.name": "lenet5_bn",
    "model.weights": "none",
    "model.image_size": 32,
    "data.phantom.train": 70,
    "data.phantom.val": 22,
    "data.phantom.test": 21,
    "data.batch_size": 16,
    "eval.batch_size": 8,
    "eval.resamples": 20,
    "train.epochs": 3,
    "train.min_steps": 0,
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments, *, devices, cache, pause=0.0):
    """The process of `launch.py` with these arguments, on so many simulated devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        PAUSE: str(pause),
    }
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def start_run(folder, count, *, cache, pause=0.0, **settings):
    """The `count` processes of a run in `folder`, with four devices in all."""
    shared = [
        "--config=configs/finetune.py",
        f"--workdir={folder}",
        *(f"--config.{key}={value}" for key, value in {**SETTINGS, **settings}.items()),
    ]
    meeting = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}", "--wait=200"]
    return [
        start(
            [*shared, *([*meeting, f"--process={number}"] if count > 1 else ())],
            devices=4 // count,
            cache=cache,
            pause=pause,
        )
        for number in range(count)
    ]


def ended(processes):
    """`(exit codes, outputs)` of the processes, once all of them have ended."""
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def wait_for_epochs(folder, processes, epochs):
    """Waits until the log of the run has so many epochs."""
    log = folder / "metrics.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= epochs):
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.02)


def _main():
    sys.path.insert(0, str(ROOT))
    import launch
    from experiments import reporting
    from medtl_jax.distributed import Stop
    from medtl_jax.training import checkpoint

    # Every epoch is written, so that one who is killed goes on from its last one.
    checkpoint.SECONDS_APART = 0.0
    reporting.explain = lambda *args: None
    reporting.draw_figures = lambda *args: {}
    reporting.draw_sheet = lambda *args: None
    reporting.save_figures = lambda *args: None
    reporting.write_report = lambda path, **content: None
    for name in ("ablation", "ensemble"):
        if f"--config=configs/{name}.py" in sys.argv:
            study = importlib.import_module(f"experiments.{name}")
            study.study_sheet = lambda *args: {}
            study.save_figures = lambda *args: None
    asked, pause = Stop.__call__, float(os.environ[PAUSE])

    def slowly(self):
        time.sleep(pause)
        return asked(self)

    Stop.__call__ = slowly
    sys.exit(launch.run_command(sys.argv))


if __name__ == "__main__":
    _main()
