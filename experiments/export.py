"""Writes the network of a run as one file that jax alone can run: StableHLO, weights inside.

    python launch.py --config=configs/finetune.py --config.experiment=export --workdir=EXPORTED \\
        --config.eval.run=RUN --config.data.name=folder --config.data.dir=DIR

`EXPORTED/model.stablehlo` takes images uint8 `[b, size, size, channels]` as they are stored and
gives the scores that `predict` writes, on a CPU, an NVIDIA GPU or a TPU: normalisation and
`model.contrast` are inside. Reading files and resizing them (Pillow, bicubic) are not; `b` is
`eval.batch_size`. `model.json` names the classes, the input and the checksums, and `example.py` is
the program around it: it imports jax and numpy, nothing else (jax reads such files with the
package flatbuffers).

    python EXPORTED/example.py IMAGES.npy SCORES.npy

Before anything is written the file is read back and runs on the validation images of `config.data`,
500 at most: where its scores are not the run's own, nothing is left behind. Averaging over
augmented views (`eval.tta`) and the temperature of the calibration are no part of it.
"""

import functools
import hashlib
from collections.abc import Set

import jax
import numpy as np

from experiments import study, trained
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.report.predict import predict_scores
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.exported import PLATFORMS, call_in_batches, export_scores
from medtl_jax.training.inference import make_predict

PROGRAM, CARD, EXAMPLE = "model.stablehlo", "model.json", "example.py"

MOST_COMPARED = 500
TOLERANCE = 1e-5
"""Between the file's scores and the run's: absolute, of numbers (regress) above 1 relative."""
_OF_HALVES = 1e-3  # of masks: the run keeps their probabilities in float16

_EXAMPLE = '''"""python example.py IMAGES.npy SCORES.npy: scores of images uint8 [n, h, w, c]."""
import pathlib, sys
import jax, numpy as np
from jax import export

path = pathlib.Path(__file__).with_name("model.stablehlo")
program = export.deserialize(bytearray(path.read_bytes()))
images, size = np.load(sys.argv[1]), program.in_avals[0].shape[0]
padded = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), np.uint8)])
scores = [jax.device_get(program.call(part)) for part in np.split(padded, len(padded) // size)]
np.save(sys.argv[2], np.concatenate(scores)[: len(images)])
'''


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config with what belongs to the run taken from there, as `evaluate` does."""
    config = trained.take_model(config, given)
    return trained.take_splits(config, given, ("val",))


def run(request: Request) -> None:
    """Writes the program, its card and an example of its use."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    size = config["eval"]["batch_size"]
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", size, mesh)
    model = trained.open_run(trained.run_folder(config))
    task = model.fitted.task
    dataset = study.read_data(
        config, console, model.channels, task=task.name, classes=task.classes, splits=("val",)
    )
    images = np.asarray(dataset.splits["val"].images[:MOST_COMPARED])
    console.note("lowering the network")
    content = _exported(model.fitted, (size, *_shape(config, model.channels)))
    predict = make_predict(model.fitted.network, model.fitted.spec, mesh, size)
    of_images = functools.partial(predict_scores, predict, model.fitted.variables)
    difference = _difference(content, of_images(images, task), images, task.name)
    environment = study.describe(request, dataset, task, model.weights)
    environment["checkpoint_sha256"] = model.sha256
    card = _card(config, environment, model, content)
    card["parity"] = {"images": len(images), "largest_difference": difference}
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        write_file(folder / PROGRAM, content)
        write_file(folder / EXAMPLE, _EXAMPLE)
        runs.write_json(folder / CARD, card)
    console.note(
        f"{folder / PROGRAM}: {len(content) / 1e6:.1f} MB; its scores of {len(images)} validation "
        f"images are the run's to {difference:.1e}"
    )


def _shape(config: dict, channels: int) -> tuple[int, int, int]:
    side = config["model"]["image_size"]
    return side, side, channels


def _exported(fitted: Fitted, shape: tuple[int, int, int, int]) -> bytes:
    program = export_scores(fitted.network, fitted.spec, fitted.variables, fitted.task, shape)
    return bytes(program.serialize())


def _difference(content: bytes, wanted: np.ndarray, images: np.ndarray, task: str) -> float:
    """The largest difference of the program's scores from `wanted`. UserError above the tolerance.

    That of a number above 1 is relative to it.
    """
    found = call_in_batches(jax.export.deserialize(bytearray(content)), images)
    wanted = wanted.astype(np.float32)
    worst = float(np.max(np.abs(found - wanted) / np.maximum(1, np.abs(wanted))))
    tolerance = _OF_HALVES if task == "segment" else TOLERANCE
    if not worst <= tolerance:
        raise UserError(
            f"the exported network's scores differ from the run's by {worst:.1e}, more than "
            f"{tolerance:g}: nothing was written; export it on a CPU, in float32 "
            "(JAX_PLATFORMS=cpu, a run with model.compute=float32)"
        )
    return worst


def _card(config: dict, environment: dict, model: trained.TrainedModel, content: bytes) -> dict:
    """What stands in `model.json`, but for the comparison."""
    shape = [config["eval"]["batch_size"], *_shape(config, model.channels)]
    task = model.fitted.task
    return {
        "input": {
            "shape": shape,
            "dtype": "uint8",
            "resize": "Pillow, bicubic, to a square; grey values as one channel",
            "inside": "normalisation and contrast",
        },
        "task": task.to_card(),
        "output": "probabilities" if task.name != "regress" else "numbers in the targets' units",
        "platforms": list(PLATFORMS),
        "network": config["model"]["name"],
        "run": config["eval"]["run"],
        "epoch": model.epoch,
        "checkpoint_sha256": model.sha256,
        "weights_sha256": model.weights["sha256"],
        "program_sha256": hashlib.sha256(content).hexdigest(),
        "calling_convention": jax.export.deserialize(bytearray(content)).calling_convention_version,
        "packages": environment["packages"],
    }
