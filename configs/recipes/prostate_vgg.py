"""Tells clinically significant prostate lesions by the features of a frozen VGG-16.

System 13 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/prostate_vgg.py \\
    --config.data.dir=PROSTATEX/labels.csv
Stand-in: python launch.py --config=configs/recipes/prostate_vgg.py:SETS
Data: PROSTATEx: patches around the lesions of PROSTATEx-Findings-Train.csv that you store as
PROSTATEX/images/ID.png, and a labels.csv with id, split, patient and ClinSig.
Stand-in set: BreastMNIST, ultrasound: malignant or not.
Weights: torchvision's VGG-16 is downloaded once; a file of Keras's convolutions is
--config.model.weights=vgg16_imagenet_notop.npz. The last maps are averaged (vgg16_gap).
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Features of the convolutions, a linear probe."""
    config = default.get_config()
    config.experiment = "extract"
    config.task = "classify"
    config.model.name = "vgg16_gap"
    config.model.image_size = 64
    config.data.name = "csv"
    config.data.csv_path_column = "id"
    config.data.csv_path_format = "images/{}.png"
    config.data.csv_label_column = "ClinSig"
    config.data.csv_patient_column = "patient"
    config.eval.drift = False
    if stand_in:
        stand_ins.breastmnist(config, stand_in)
    return config
