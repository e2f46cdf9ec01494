"""Grades diabetic retinopathy after geometric and colour augmentation of fundus photographs.

System 3 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/retinopathy_augmentation.py \\
    --config.data.dir=APTOS/train.csv
Stand-in: python launch.py --config=configs/recipes/retinopathy_augmentation.py:SETS
Data: APTOS 2019 as published: APTOS/train.csv (id_code, diagnosis 0 to 4) beside the folder
train_images. A fifth of it is set aside for test.
Stand-in set: BCCD's blood smears, in colour: with a platelet or without.
Weights: EfficientNet-Lite0's come with an installed package. What each transform brings is an
ablation: configs/ablation.py.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """The preset of fundus photographs; grades have unequal numbers."""
    config = default.get_config()
    config.task = "classify"
    config.model.image_size = 128
    config.data.name = "csv"
    config.data.csv_path_column = "id_code"
    config.data.csv_path_format = "train_images/{}.png"
    config.data.csv_label_column = "diagnosis"
    config.data.csv_split_column = ""
    config.augment.preset = "fundus"
    config.train.class_weights = "balanced"
    config.train.epochs = 3
    config.train.min_steps = 150
    config.eval.drift = False
    if stand_in:
        stand_ins.bccd(config, stand_in)
    return config
