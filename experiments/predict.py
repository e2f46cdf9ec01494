"""Turns a folder of images into a CSV of probabilities, by the best checkpoint of a run.

    python launch.py --config=configs/finetune.py --config.experiment=predict \\
        --config.eval.run=RUN --config.data.dir=IMAGES

Writes `predictions.csv`: the path of each image, the most probable class, and a column for
each class. Model, image size and bit depth of 16-bit files are those of the run.
"""

import csv
import hashlib
import io
import json
from collections.abc import Set

from experiments import trained
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.images import read_images_for_prediction
from medtl_jax.errors import UserError
from medtl_jax.files import is_text, write_file
from medtl_jax.report.predict import predict_scores
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config with the model's sections taken from the run; see `trained.take_model`."""
    return trained.take_model(config, given)


def run(request: Request) -> None:
    """Writes `predictions.csv` for the images of `config.data.dir`."""
    config, folder, console = request.config, request.folder, request.console
    if not config["data"]["dir"]:
        raise UserError("data.dir is empty: name the folder of images, or one image, to predict")
    runs.check_folder(folder, config)
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    model = trained.open_run(trained.run_folder(config))
    with console.progress("images") as advance:
        images, ids = read_images_for_prediction(
            config["data"]["dir"],
            config["model"]["image_size"],
            model.bit_depth,
            model.channels,
            advance,
        )
    for name in ids:
        if not is_text(name):
            raise UserError(f"data.dir: the file name {str(name)!a} is not UTF-8; rename it")
    digest = hashlib.sha256(json.dumps(ids.tolist()).encode())
    digest.update(images)
    environment = {
        **runs.describe_environment(),
        "data_sha256": digest.hexdigest(),
        "weights": model.weights,
        "weights_sha256": model.weights["sha256"],
        "checkpoint_sha256": model.sha256,
    }
    predict = make_predict(model.network, model.spec, mesh, config["eval"]["batch_size"])
    scores = predict_scores(predict, model.variables, images)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "predicted", *model.classes])
    for name, row in zip(ids, scores, strict=True):
        writer.writerow([name, model.classes[row.argmax()], *(f"{p:.6f}" for p in row)])
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        write_file(folder / "predictions.csv", text.getvalue())
    console.note(f"{len(ids)} images: {folder / 'predictions.csv'}")
