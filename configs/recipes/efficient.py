"""Fine-tunes the late stages of an efficient network on what its early ones made, kept on disk.

System 15 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/efficient.py \\
    --config.data.dir=chest_xray
Stand-in: python launch.py --config=configs/recipes/efficient.py:SETS
Data: Kermany's chest X-rays as published: chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}. As
published, val has 16 images, and patients are in several splits.
Stand-in set: the same images at 224 pixels, split by patient.
Weights: EfficientNet-Lite0's come with an installed package. What the frozen stages make of the
images and of one augmented view of each is computed once and stays in transfer.cache_dir.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Stem and stages 1 to 4 frozen, their maps kept."""
    config = default.get_config()
    config.model.image_size = 96
    config.data.name = "folder"
    config.transfer.groups.frozen = "stem,stage[1-4]"
    config.transfer.groups.low = "stage[5-7],features"
    config.transfer.groups.high = "head"
    config.transfer.cache = "prefix"
    config.transfer.views = 1
    config.augment.preset = "xray"
    config.train.epochs = 2
    config.train.min_steps = 250
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany(config, stand_in)
    return config
