"""Carries a classifier of dental X-rays to another device by adversarial and other adaptation.

System 14 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/dental_adversarial.py \\
    --config.data.dir=DENTEX --config.domain.target.dir=TUFTS
Stand-in: python launch.py --config=configs/recipes/dental_adversarial.py:SETS
Data: DENTEX and, without use of its labels but to score, the Tufts Dental Database: crops of teeth
as class folders that you arrange, DENTEX/{train,val,test}/{healthy,carious}, whole patients.
Stand-in set: Kermany's chest X-rays of children, to the NIH's of adults.
Weights: EfficientNet-Lite0's come with an installed package. One seed, to stay within minutes;
--config.adapt.seeds=3 gives verdicts.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """A discriminator with minimum class confusion, beside statistics of the target's own."""
    config = default.get_config()
    config.experiment = "adapt"
    config.task = "classify"
    config.model.image_size = 64
    config.data.name = "folder"
    config.domain.target.name = "folder"
    config.domain.width = 256
    config.adapt.methods = "source,adabn,cdan_e+mcc"
    config.adapt.seeds = 1
    config.augment.preset = "xray"
    config.train.epochs = 1
    config.train.min_steps = 120
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany_to_nih(config, stand_in)
    return config
