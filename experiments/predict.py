"""Turns a folder of images into a CSV of probabilities, by the best checkpoint of a run.

    python launch.py --config=configs/finetune.py --config.experiment=predict \\
        --config.eval.run=RUN --config.data.dir=IMAGES

Writes `predictions.csv`: the path of each image, the most probable class, and a column for
each class. The model comes from the run folder.
"""

import csv

from experiments import study
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.images import read_images_for_prediction
from medtl_jax.errors import UserError
from medtl_jax.report.predict import predict_scores
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict


def resolve(config: dict) -> dict:
    """The config as it is."""
    return config


def run(request: Request) -> None:
    """Writes `predictions.csv` for the images of `config.data.dir`."""
    config, folder, console = request.config, request.folder, request.console
    runs.check_folder(folder, config)
    if not config["data"]["dir"]:
        raise UserError("data.dir is empty: name the folder of images, or one image, to predict")
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    trained = study.open_run(config["eval"]["run"])
    # The depth belongs to what the network was trained on, not to this command.
    depth = trained.config["data"]["bit_depth"]
    size = trained.config["model"]["image_size"]
    images, ids = read_images_for_prediction(config["data"]["dir"], size, depth, trained.channels)
    environment = {**runs.describe_environment(), "weights": trained.report}
    runs.open_folder(folder, config, environment)
    predict = make_predict(trained.network, trained.spec, mesh, config["eval"]["batch_size"])
    scores = predict_scores(predict, trained.variables, images)
    path = folder / "predictions.csv"
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "predicted", *trained.classes])
        for name, row in zip(ids, scores, strict=True):
            writer.writerow([name, trained.classes[row.argmax()], *(f"{p:.6f}" for p in row)])
    part.replace(path)
    console.note(f"{len(ids)} images: {path}")
