"""Turns a folder of images into a table of predictions, by the best checkpoint of a run.

    python launch.py --config=configs/finetune.py --config.experiment=predict \\
        --config.eval.run=RUN --config.data.dir=IMAGES

IMAGES is a folder of pictures, DICOM files and NIfTI volumes, or one of them. Of a file with
several images the k-th, from 0, is called `path#k`.

Writes `predictions.csv`: the path of each image and a column for each class, finding or number;
where the classes exclude each other, the most probable one too. A segmentation writes masks
`masks/<path>.png` of the images' own sizes. Model and image size are those of the run; so are,
unless they are given, the bit depth of 16-bit files, and window, plane and slices of DICOM and
NIfTI files (`config.data`).

With `eval.tta` the scores are averaged over so many views of each image, as an evaluation measures
it, and the table has a column `averaged_views` with their number. A view depends on the seed and on
the image's path in the table.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Set

import numpy as np
from PIL import Image

from experiments import trained
from experiments.study import Fitted, Request
from medtl_jax import runs
from medtl_jax.data.medical import reading_of
from medtl_jax.data.prediction import original_sizes, read_images_for_prediction
from medtl_jax.errors import UserError
from medtl_jax.files import is_text, write_file
from medtl_jax.objectives.task import Task
from medtl_jax.report.predict import predict_masks, predict_scores
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.views import check_views, make_view_predict

TABLE = "predictions.csv"
# The column that says how many views of an image its scores are averaged over.
_VIEWS = "averaged_views"
# Bytes that file systems allow for a name, less `.`, `.png.` and the process id of a draft.
_LONGEST_NAME = 255 - 13


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
    reading = reading_of(config["data"])
    model = trained.open_run(trained.run_folder(config))
    views, masks = config["eval"]["tta"], model.fitted.task.name == "segment"
    check_views(config["augment"], views, masks, model.channels)
    with console.progress("images") as advance:
        images, ids, notes = read_images_for_prediction(
            config["data"]["dir"],
            config["model"]["image_size"],
            config["data"]["bit_depth"],
            model.channels,
            advance,
            reading,
        )
    for note in notes:
        console.note(f"note: {note}")
    _check_names(ids, model.fitted.task)
    digest = hashlib.sha256(json.dumps(ids.tolist()).encode())
    digest.update(images)
    environment = {
        **runs.describe_environment(),
        "data_sha256": digest.hexdigest(),
        "weights": model.weights,
        "weights_sha256": model.weights["sha256"],
        "checkpoint_sha256": model.sha256,
    }
    found = _predicted(config, model.fitted, mesh, images, ids)
    sizes = []
    if masks:
        sizes = original_sizes(config["data"]["dir"], ids.tolist(), reading)
    files = _files(model.fitted.task, found, ids.tolist(), sizes, views)
    runs.open_folder(folder, config, environment)
    with runs.hold(folder):
        for name, content in files:
            write_file(folder / name, content)
    averaged = f", averaged over {views} views of each" if views else ""
    console.note(f"{len(ids)} images{averaged}: {folder / TABLE}")


def _predicted(
    config: dict, fitted: Fitted, mesh: DataMesh, images: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """The scores of the images, for a segmentation their masks; of one batch at a time."""
    views, size = config["eval"]["tta"], config["eval"]["batch_size"]
    masks = fitted.task.name == "segment"
    if not views:
        predict = make_predict(fitted.network, fitted.spec, mesh, size)
        of_images = predict_masks if masks else predict_scores
        return of_images(predict, fitted.variables, images, fitted.task)
    predict = make_view_predict(
        fitted.network,
        fitted.spec,
        mesh,
        size,
        augment=config["augment"],
        views=views,
        seed=config["seed"],
        ids=ids,
        masks=masks,
        finish=_most_probable if masks else _as_they_are,
    )
    return predict_scores(predict, fitted.variables, images, fitted.task)


def _most_probable(score: np.ndarray) -> np.ndarray:
    return score.argmax(axis=-1).astype(np.uint8)


def _as_they_are(score: np.ndarray) -> np.ndarray:
    return score


def _check_names(ids: np.ndarray, task: Task) -> None:
    """UserError for a file name that the table cannot hold, or that no mask can be named by."""
    for name in ids:
        if not is_text(name):
            raise UserError(f"data.dir: the file name {str(name)!a} is not UTF-8; rename it")
        if task.name == "segment" and len(name.split("/")[-1].encode()) > _LONGEST_NAME:
            raise UserError(f"data.dir: {name} is too long a name for its mask, + .png; rename it")


def _files(
    task: Task, found: np.ndarray, ids: list[str], sizes: list[tuple[int, int]], views: int
) -> Iterator[tuple[str, str | bytes]]:
    """`(name, content)` of each file to write, the table last.

    `found` are the scores of the images, for a segmentation their masks, whose widths and heights
    are `sizes`; `views` is `eval.tta`.
    """
    rows = [_cells(task, row) for row in found]
    if task.name == "segment":
        for name, mask, row, size in zip(ids, found, rows, sizes, strict=True):
            row.insert(0, f"masks/{name}.png")
            yield row[0], _mask_png(mask, len(task.classes), size)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    head, averaged = ([_VIEWS], [views]) if views else ([], [])
    writer.writerow(["path", *head, *_heads(task)])
    writer.writerows([name, *averaged, *row] for name, row in zip(ids, rows, strict=True))
    yield TABLE, text.getvalue()


def _heads(task: Task) -> list[str]:
    """The columns of the table after the path and the number of views."""
    first = {"classify": ["predicted"], "ordinal": ["predicted"], "segment": ["mask"]}
    return [*first.get(task.name, []), *task.classes]


def _cells(task: Task, score: np.ndarray) -> list[str]:
    """What the table says of one image by its score; by its mask, the share of each class."""
    if task.name == "regress":
        return [f"{value:.6g}" for value in score]
    if task.name == "multilabel":
        return [f"{value:.6f}" for value in score]
    if task.name == "segment":
        counts = np.bincount(score.ravel(), minlength=len(task.classes))
        return [f"{value:.6f}" for value in counts / counts.sum()]
    return [task.classes[score.argmax()], *(f"{value:.6f}" for value in score)]


def _mask_png(mask: np.ndarray, classes: int, size: tuple[int, int]) -> bytes:
    """The class of each pixel as a PNG of the image's own size; of two classes, 0 and 255."""
    values = mask * np.uint8(255 if classes == 2 else 1)
    picture = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
