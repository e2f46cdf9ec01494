"""Carries a segmentation of retinal vessels to another camera by adversarial adaptation.

System 5 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/vessels_adversarial.py \\
    --config.data.dir=DRIVE/labels.csv --config.domain.target.dir=CHASE/labels.csv
Stand-in: python launch.py --config=configs/recipes/vessels_adversarial.py:SETS
Data: DRIVE, and CHASE_DB1 without use of its masks but to score: each as images/ID.png and
masks/ID.png that you store beside a labels.csv with id, split and patient.
Stand-in set: nuclei in fluorescence, to those in stained tissue.
Weights: EfficientNet-Lite0's come with an installed package. One seed, to stay within minutes;
--config.adapt.seeds=3 gives verdicts.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """DANN on the features of the encoder, and MMD beside it."""
    config = default.get_config()
    config.experiment = "adapt"
    config.task = "segment"
    config.model.image_size = 64
    config.data.name = "csv"
    config.data.batch_size = 16
    config.data.csv_path_column = "id"
    config.data.csv_path_format = "images/{}.png"
    config.data.csv_mask_column = "id"
    config.data.csv_mask_format = "masks/{}.png"
    config.data.csv_patient_column = "patient"
    config.data.classes = "background,vessel"
    config.domain.target.name = "csv"
    config.domain.width = 256
    config.adapt.methods = "source,dann,mmd"
    config.adapt.seeds = 1
    config.optim.high.lr = 5e-3
    config.augment.flip_vertical = 0.5
    config.augment.quarter_turns = 0.75
    config.augment.gamma = 0.5
    config.train.epochs = 1
    config.train.min_steps = 120
    config.train.epoch_steps = 24
    config.eval.drift = False
    if stand_in:
        stand_ins.nuclei_stained(config, stand_in)
    return config
