"""Tells lung nodules from other tissue by a GoogLeNet whose stages are all fine-tuned.

System 2 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/nodule_googlenet.py \\
    --config.data.dir=LUNA16
Stand-in: python launch.py --config=configs/recipes/nodule_googlenet.py:SETS
Data: LUNA16 (LIDC-IDRI): patches around the candidates of candidates_V2.csv that you cut and store
as LUNA16/{train,val,test}/{nodule,other}/*.png, all of a scan in one split.
Stand-in set: Kermany's chest X-rays: normal or pneumonia.
Weights: torchvision's GoogLeNet is downloaded once; with the file of Caffe's instead
--config.model.name=googlenet_caffe --config.model.weights=bvlc_googlenet_caffe.npz.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Every stage learns, the head fastest; nodules are few, so classes are balanced."""
    config = default.get_config()
    config.model.name = "googlenet"
    config.model.image_size = 96
    config.data.name = "folder"
    config.transfer.strategy = "full"
    config.optim.low.lr = 2e-4
    config.augment.preset = "ct"
    config.train.class_weights = "balanced"
    config.train.epochs = 1
    config.train.min_steps = 120
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany(config, stand_in)
    return config
