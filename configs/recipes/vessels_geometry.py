"""Segments the vessels of the retina after geometric augmentation.

System 12 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/vessels_geometry.py \\
    --config.data.dir=DRIVE/labels.csv
Stand-in: python launch.py --config=configs/recipes/vessels_geometry.py:SETS
Data: DRIVE: its images and first manual masks that you store as DRIVE/images/ID.png and
DRIVE/masks/ID.png, and a labels.csv with id, split and patient (each image its own).
Stand-in set: CHASE_DB1, with a second observer.
Weights: EfficientNet-Lite0's come with an installed package. 256 pixels lose the thinnest vessels;
512 take four times as long.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Flips, turns, warps and elastic deformation; grey values stay as they are."""
    config = default.get_config()
    config.task = "segment"
    config.model.image_size = 256
    config.data.name = "csv"
    config.data.batch_size = 4
    config.data.csv_path_column = "id"
    config.data.csv_path_format = "images/{}.png"
    config.data.csv_mask_column = "id"
    config.data.csv_mask_format = "masks/{}.png"
    config.data.csv_patient_column = "patient"
    config.data.classes = "background,vessel"
    config.optim.high.lr = 5e-3
    config.augment.flip_vertical = 0.5
    config.augment.quarter_turns = 0.75
    config.augment.shift = 0.05
    config.augment.rotate = 20.0
    config.augment.scale = 0.15
    config.augment.shear = 5.0
    config.augment.elastic = 0.02
    config.augment.brightness = 0.0
    config.augment.contrast = 0.0
    config.train.epochs = 1
    config.train.min_steps = 120
    config.train.epoch_steps = 20  # 16 images are not validated after every pass
    config.eval.batch_size = 8
    config.eval.drift = False
    if stand_in:
        stand_ins.chase_db1(config, stand_in)
    return config
