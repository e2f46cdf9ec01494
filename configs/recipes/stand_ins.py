"""The sets that stand in for those of the recipes: where they lie and what their tables say.

Command: none; a recipe with an argument uses it: --config=configs/recipes/bone_age.py:SETS, where
SETS is a folder with the sets under these names:

    chest_xray_kermany224  labels.csv (path, split, label, subtype, patient), children's chest
                           X-rays of Kermany et al. 2018, split by patient
    chest_xray_nih224      labels.csv (path, split, label, patient, age, one column a finding),
                           adults' chest X-rays of Wang et al. 2017, split by patient
    nuclei_dsb2018_256     labels.csv (id, split, domain, group), images/{id}.png, masks/{id}.png,
                           Caicedo et al. 2019
    chase_db1              labels.csv (id, split, patient), images/{id}.jpg, masks/{id}.png,
                           masks_observer2/{id}.png, Fraz et al. 2012
    bccd                   labels.csv (id, split, has_platelet), images/{id}.jpg
    medmnist               breastmnist.npz, Yang et al. 2023

A stand-in shows that a recipe runs on real images, and roughly what it costs. Its scores say
nothing about the recipe's own set.
"""

from medtl_jax.errors import UserError
from medtl_jax.files import user_path

# As configs/default.py has them: a recipe names the columns of its own set.
_COLUMNS = {
    "csv_path_column": "path",
    "csv_path_format": "{}",
    "csv_split_column": "split",
    "csv_label_column": "label",
    "csv_mask_column": "",
    "csv_mask_format": "{}",
    "csv_mask2_format": "",
    "csv_patient_column": "",
    "csv_where": "",
    "classes": "",
}


def kermany(config, sets, label="label"):
    """Sets `data` to children's chest X-rays: normal or pneumonia, or `label="subtype"`, three."""
    _csv(
        config, sets, "chest_xray_kermany224", csv_label_column=label, csv_patient_column="patient"
    )


def nih(config, sets, label):
    """Sets `data` to adults' chest X-rays; `label` names a column, or several with commas."""
    _csv(config, sets, "chest_xray_nih224", csv_label_column=label, csv_patient_column="patient")


def kermany_to_nih(config, sets):
    """Sets `data` to the children's chest X-rays and `domain.target` to the adults'."""
    kermany(config, sets)
    config.domain.target.name = "csv"
    config.domain.target.dir = _file(sets, "chest_xray_nih224/labels.csv")


def nuclei(config, sets):
    """Sets `data` to images of nuclei with their masks."""
    _csv(
        config,
        sets,
        "nuclei_dsb2018_256",
        csv_path_column="id",
        csv_path_format="images/{}.png",
        csv_mask_column="id",
        csv_mask_format="masks/{}.png",
        csv_patient_column="group",
        classes="background,nucleus",
    )


def nuclei_stained(config, sets):
    """Sets `data` to nuclei in fluorescence and `domain.target` to nuclei in stained tissue."""
    nuclei(config, sets)
    config.data.csv_where = "domain=fluorescence"
    config.domain.target.name = "csv"
    config.domain.target.dir = config.data.dir
    config.domain.target.csv_where = "domain=stained_colour"


def chase_db1(config, sets):
    """Sets `data` to photographs of the retina with the masks of two observers."""
    _csv(
        config,
        sets,
        "chase_db1",
        csv_path_column="id",
        csv_path_format="images/{}.jpg",
        csv_mask_column="id",
        csv_mask_format="masks/{}.png",
        csv_mask2_format="masks_observer2/{}.png",
        csv_patient_column="patient",
        classes="background,vessel",
    )


def bccd(config, sets):
    """Sets `data` to colour images of blood smears: with a platelet (1) or without (0)."""
    _csv(
        config,
        sets,
        "bccd",
        csv_path_column="id",
        csv_path_format="images/{}.jpg",
        csv_label_column="has_platelet",
    )


def breastmnist(config, sets):
    """Sets `data` to ultrasound images of the breast, 28 pixels: malignant or not."""
    config.data.name = "npz"
    config.data.dir = _file(sets, "medmnist/breastmnist.npz")
    config.data.update(_COLUMNS)


def _csv(config, sets, folder, **columns):
    config.data.name = "csv"
    config.data.dir = _file(sets, f"{folder}/labels.csv")
    config.data.update({**_COLUMNS, **columns})


def _file(sets, name):
    """The path of a file of SETS; UserError where it is not there."""
    path = user_path(sets, "the argument SETS") / name
    if not path.is_file():
        raise UserError(
            f"{path} is not there: what follows the colon is the folder of the stand-in sets, see "
            "configs/recipes/stand_ins.py"
        )
    return str(path)
