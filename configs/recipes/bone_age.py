"""Reads the bone age from X-rays of the hand by the features of a frozen ResNet-50.

System 6 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/bone_age.py \\
    --config.data.dir=RSNA/boneage-training-dataset.csv
Stand-in: python launch.py --config=configs/recipes/bone_age.py:SETS
Data: RSNA Pediatric Bone Age Challenge as published: boneage-training-dataset.csv (id, boneage in
months, male) beside the folder boneage-training-dataset. A fifth of it is set aside for test.
Stand-in set: the NIH's chest X-rays: age in years.
Weights: torchvision's ResNet-50 is downloaded once; a file of it is --config.model.weights=FILE.
The sex is not an input.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Features of the whole network, ridge regression."""
    config = default.get_config()
    config.experiment = "extract"
    config.task = "regress"
    config.model.name = "resnet50"
    config.model.image_size = 128
    config.data.name = "csv"
    config.data.csv_path_column = "id"
    config.data.csv_path_format = "boneage-training-dataset/{}.png"
    config.data.csv_label_column = "boneage"
    config.data.csv_split_column = ""
    config.eval.drift = False
    if stand_in:
        stand_ins.nih(config, stand_in, "age")
    return config
