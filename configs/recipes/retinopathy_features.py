"""Grades diabetic retinopathy by the features of a frozen Inception-v3 and a linear probe.

System 1 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/retinopathy_features.py \\
    --config.data.dir=APTOS/train.csv
Stand-in: python launch.py --config=configs/recipes/retinopathy_features.py:SETS
Data: APTOS 2019 as published: APTOS/train.csv (id_code, diagnosis 0 to 4) beside the folder
train_images. A fifth of it is set aside for test.
Stand-in set: Kermany's chest X-rays: normal, bacteria, virus.
Weights: torchvision's Inception-v3 is downloaded once; a file of it is --config.model.weights=FILE.
128 pixels suit a laptop; the network was made for 299 (--config.model.image_size=299).
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Features of the whole network; nothing is trained by steps."""
    config = default.get_config()
    config.experiment = "extract"
    config.task = "classify"
    config.model.name = "inception_v3"
    config.model.image_size = 128
    config.data.name = "csv"
    config.data.csv_path_column = "id_code"
    config.data.csv_path_format = "train_images/{}.png"
    config.data.csv_label_column = "diagnosis"
    config.data.csv_split_column = ""
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany(config, stand_in, "subtype")
    return config
