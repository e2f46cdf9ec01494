"""Tells lung cancer from other CT slices by fine-tuning on contrast-enhanced images.

System 11 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/lung_contrast.py \\
    --config.data.dir=IQ-OTH
Stand-in: python launch.py --config=configs/recipes/lung_contrast.py:SETS
Data: IQ-OTH/NCCD: its slices as class folders that you arrange with splits,
IQ-OTH/{train,val,test}/{benign,malignant,normal}, all slices of a case in one split.
Stand-in set: Kermany's chest X-rays: normal or pneumonia.
Weights: EfficientNet-Lite0's come with an installed package. Without the enhancement:
--config.model.contrast=none.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """CLAHE before the network, the first half of the stages frozen."""
    config = default.get_config()
    config.model.image_size = 128
    config.model.contrast = "clahe"
    config.data.name = "folder"
    config.augment.preset = "ct"
    config.train.class_weights = "balanced"
    config.train.epochs = 1
    config.train.min_steps = 120
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany(config, stand_in)
    return config
