"""MedMNIST: the publisher's table of 2D sets, and their download."""

import dataclasses
import hashlib
from pathlib import Path

import pooch

from medtl_jax.data.catalog import SPLITS, Dataset, check_equal_classes
from medtl_jax.data.images import Progress, one_line
from medtl_jax.data.npz import load_npz
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

SIZES = (28, 64, 128, 224)

# What the publisher's words for a task are here; the first is taken where none is asked for.
_TASKS = {
    "multi-label, binary-class": ("multilabel",),
    "ordinal-regression": ("classify", "ordinal"),
}

_URL = "https://zenodo.org/records/10519652/files/{file}?download=1"


@dataclasses.dataclass(frozen=True)
class MedMnistSet:
    """What the publisher says of one set (Yang et al. 2023, MedMNIST v2; Zenodo 10519652).

    Attributes:
      classes: class names; the index is the label.
      task: the publisher's word for it.
      licence: licence of the images.
      md5: MD5 of the .npz at each of `SIZES`.
    """

    classes: tuple[str, ...]
    task: str
    licence: str
    md5: tuple[str, str, str, str]


_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)

TABLE = {
    "pathmnist": MedMnistSet(
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        "multi-class",
        "CC BY 4.0",
        (
            "a8b06965200029087d5bd730944a56c1",
            "55aa9c1e0525abe5a6b9d8343a507616",
            "ac42d08fb904d92c244187169d1fd1d9",
            "2c51a510bcdc9cf8ddb2af93af1eadec",
        ),
    ),
    "chestmnist": MedMnistSet(
        (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        "multi-label, binary-class",
        "CC BY 4.0",
        (
            "02c8a6516a18b556561a56cbdd36c4a8",
            "9de6cd0b934ebb5b7426cfba5efbae16",
            "db107e5590b27930b62dbaf558aebee3",
            "45bd33e6f06c3e8cdb481c74a89152aa",
        ),
    ),
    "dermamnist": MedMnistSet(
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        "multi-class",
        "CC BY-NC 4.0",
        (
            "0744692d530f8e62ec473284d019b0c7",
            "b70a2f5635c6199aeaa28c31d7202e1f",
            "2defd784463fa5243564e855ed717de1",
            "8974907d8e169bef5f5b96bc506ae45d",
        ),
    ),
    "octmnist": MedMnistSet(
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
        "multi-class",
        "CC BY 4.0",
        (
            "c68d92d5b585d8d81f7112f81e2d0842",
            "e229e9440236b774d9f0dfef9d07bdaf",
            "0a97e76651ace45c5d943ee3f65b63ae",
            "abc493b6d529d5de7569faaef2773ba3",
        ),
    ),
    "pneumoniamnist": MedMnistSet(
        ("normal", "pneumonia"),
        "binary-class",
        "CC BY 4.0",
        (
            "28209eda62fecd6e6a2d98b1501bb15f",
            "8f4eceb4ccffa70c672198ea285246c6",
            "05b46931834c231683c68f40c47b2971",
            "d6a3c71de1b945ea11211b03746c1fe1",
        ),
    ),
    "retinamnist": MedMnistSet(
        ("0", "1", "2", "3", "4"),
        "ordinal-regression",
        "CC BY 4.0",
        (
            "bd4c0672f1bba3e3a89f0e4e876791e4",
            "afda852cc34dcda56f86ad2b2457dbcc",
            "e48e916a24454daf90583d4e6efb1a18",
            "eae7e3b6f3fcbda4ae613ebdcbe35348",
        ),
    ),
    "breastmnist": MedMnistSet(
        ("malignant", "normal, benign"),
        "binary-class",
        "CC BY 4.0",
        (
            "750601b1f35ba3300ea97c75c52ff8f6",
            "742edef2a1fd1524b2efff4bd7ba9364",
            "363e4b3f8d712e9b5de15470a2aaadf1",
            "b56378a6eefa9fed602bb16d192d4c8b",
        ),
    ),
    "bloodmnist": MedMnistSet(
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        "multi-class",
        "CC BY 4.0",
        (
            "7053d0359d879ad8a5505303e11de1dc",
            "2b94928a2ae4916078ca51e05b6b800b",
            "adace1e0ed228fccda1f39692059dd4c",
            "b718ff6835fcbdb22ba9eacccd7b2601",
        ),
    ),
    "tissuemnist": MedMnistSet(
        (
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
        "multi-class",
        "CC BY 4.0",
        (
            "ebe78ee8b05294063de985d821c1c34b",
            "123ece2eba09d0aa5d698fda57103344",
            "61b955355d7425a89687b06cca3ce0c2",
            "b077128c4a949f0a4eb01517f9037b9c",
        ),
    ),
    "organamnist": MedMnistSet(
        _ORGANS,
        "multi-class",
        "CC BY 4.0",
        (
            "68e3f8846a6bd62f0c9bf841c0d9eacc",
            "2dcccc29b88e6da5a01161ef20cda288",
            "eeae80d0a227a8d099027e1b3cfd3b60",
            "50747347e05c87dd3aaf92c49f9f3170",
        ),
    ),
    "organcmnist": MedMnistSet(
        _ORGANS,
        "multi-class",
        "CC BY 4.0",
        (
            "b9ceb9546e10131b32923c5bbeaea2b1",
            "3ce34a8724ea6f548e6db4744d03b6a9",
            "773c1f009daa3fe5d9a2a201b2a7ed94",
            "050f5e875dc056f6768abf94ec9995d1",
        ),
    ),
    "organsmnist": MedMnistSet(
        _ORGANS,
        "multi-class",
        "CC BY 4.0",
        (
            "9ab87b696fb54e2a387ebe992d6ed5f1",
            "53a6d115339d874c25e309a994ff46d3",
            "ded0c5fa01a95dc4978b956f613e9b8e",
            "b354719e553fbbb2513d5533f52a4cb1",
        ),
    ),
}


def load_medmnist(
    name: str,
    folder: str | Path,
    image_size: int,
    progress: Progress | None = None,
    *,
    task: str = "",
    classes: tuple[str, ...] | None = None,
    splits: tuple[str, ...] = SPLITS,
) -> Dataset:
    """Returns the MedMNIST set `name`, read from `folder` or downloaded into it.

    Args:
      name: a key of `TABLE`, with `_64`, `_128` or `_224` for the larger images.
      folder: where `<name>.npz` lies or goes; "" is the user's cache folder.
      image_size: height and width of the result in pixels.
      progress: called as `progress(done, total, text)`.
      task: "" reads findings as `multilabel` and the rest as `classify`; grades can be read as
        `ordinal`.
      classes: those of a trained model, which the set's must equal.
      splits: the splits to read.

    Raises:
      UserError: unknown set, a task that its labels are not for, other classes than the model's,
        wrong MD5, failed download, or a bad file.
    """
    known, size = _look_up(name)
    tasks = _TASKS.get(known.task, ("classify",))
    if task and task not in tasks:
        raise UserError(
            f"medmnist/{name} is for task={' or '.join(tasks)}, not {task} (its labels are "
            f"{known.task})"
        )
    task = task or tasks[0]
    check_equal_classes(f"medmnist/{name}", known.classes, classes)
    md5 = known.md5[SIZES.index(size)]
    path = _find_or_download(name, md5, folder, progress)
    dataset = load_npz(path, image_size, progress, known.classes, splits=splits, task=task)
    notes = dataset.spec.notes
    if "ordinal" in tasks and task == "classify":
        notes += ("ordinal grades are read as classes without an order: see task=ordinal",)
    spec = dataclasses.replace(
        dataset.spec,
        name=f"medmnist/{name}",
        licence=known.licence,
        source=_URL.format(file=f"{name}.npz"),
        notes=notes,
    )
    return dataclasses.replace(dataset, spec=spec)


def names_by_file_name(path: Path, task: str = "") -> tuple[str, ...] | None:
    """Returns the classes or findings of the set that the file's name starts with, if there is one.

    None also where `task` has neither: numbers and masks.

    >>> names_by_file_name(Path("pneumoniamnist_cleaned.npz"))
    ('normal', 'pneumonia')
    """
    if task in ("regress", "segment"):
        return None
    stem = path.stem.lower()
    return next((known.classes for flag, known in TABLE.items() if stem.startswith(flag)), None)


def _look_up(name: str) -> tuple[MedMnistSet, int]:
    flag = name.split("_")[0]
    sizes = {flag: 28, f"{flag}_64": 64, f"{flag}_128": 128, f"{flag}_224": 224}
    if flag not in TABLE or name not in sizes:
        raise UserError(
            f"unknown MedMNIST set '{name}': choose from {', '.join(TABLE)}, "
            "with _64, _128 or _224 added for larger images (3D sets are not supported)"
        )
    return TABLE[flag], sizes[name]


def local_file(name: str, folder: str | Path) -> Path:
    """Returns where the file of the set `name` lies or goes; arguments as in `load_medmnist`."""
    root = user_path(str(folder), "data.dir") if str(folder) else Path(pooch.os_cache("medtl_jax"))
    return root / f"{name}.npz"


def _find_or_download(name: str, md5: str, folder: str | Path, progress: Progress | None) -> Path:
    path = local_file(name, folder)
    root = path.parent
    if root.is_file():
        raise UserError(f"data.dir must be a folder for medmnist/{name}, and {root} is a file")
    if path.is_file():
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
        if found != md5:
            raise UserError(
                f"{path} is not the publisher's file: its MD5 is {found}, not {md5}; delete it "
                "to download it anew, or read an unofficial file with data.name=npz and "
                f"data.dir={path}"
            )
        return path
    url = _URL.format(file=path.name)
    bar = _DownloadProgress(progress, path.name) if progress else False
    try:
        pooch.retrieve(
            url,
            known_hash=f"md5:{md5}",
            fname=path.name,
            path=root,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=30),
        )
    except (OSError, ValueError) as error:
        # requests' exceptions are OSErrors; a wrong MD5 is a ValueError.
        raise UserError(
            f"cannot download {url} ({one_line(error)}): fetch it by hand and save it as {path}"
        ) from error
    return path


class _DownloadProgress:
    """The progress-bar interface that pooch asks for, as calls of `progress`."""

    def __init__(self, progress: Progress, name: str):
        self.total = 0
        self._progress, self._name, self._done = progress, name, 0

    def update(self, count: int) -> None:
        self._done = min(self._done + count, self.total)
        # The total is 0 where the server does not announce it: there is no fraction to show.
        if self.total:
            self._progress(self._done, self.total, f"downloading {self._name}")

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        """Nothing to release: the caller owns the display."""
