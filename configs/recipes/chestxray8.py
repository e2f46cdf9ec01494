"""Finds the eight findings of ChestX-ray8 in an image, each with its AUC.

System 10 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/chestxray8.py \\
    --config.data.dir=NIH/labels.csv
Stand-in: python launch.py --config=configs/recipes/chestxray8.py:SETS
Data: NIH ChestX-ray8: a NIH/labels.csv that you make of Data_Entry_2017.csv, with Image Index,
Patient ID, split (its test_list.txt is test) and a column of 0 or 1 for each finding, beside the
folder images.
Stand-in set: 999 of the NIH's images, 224 pixels.
Weights: EfficientNet-Lite0's come with an installed package.
"""

from configs import default
from configs.recipes import stand_ins

FINDINGS = "Atelectasis,Cardiomegaly,Effusion,Infiltration,Mass,Nodule,Pneumonia,Pneumothorax"


def get_config(stand_in=""):
    """Balanced weights: most findings are rare."""
    config = default.get_config()
    config.task = "multilabel"
    config.model.image_size = 128
    config.data.name = "csv"
    config.data.csv_path_column = "Image Index"
    config.data.csv_path_format = "images/{}"
    config.data.csv_label_column = FINDINGS
    config.data.csv_patient_column = "Patient ID"
    config.augment.preset = "xray"
    config.train.class_weights = "balanced"
    config.train.epochs = 4
    config.train.min_steps = 200
    config.eval.drift = False
    if stand_in:
        stand_ins.nih(config, stand_in, FINDINGS)
    return config
