"""Carries a classifier of skin lesions to another clinic's images by adversarial adaptation.

System 9 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/skin_adversarial.py \\
    --config.data.dir=HAM10000 --config.domain.target.dir=BCN20000
Stand-in: python launch.py --config=configs/recipes/skin_adversarial.py:SETS
Data: HAM10000 and, without use of its labels but to score, BCN20000: each as class folders that you
arrange, HAM10000/{train,val,test}/{melanoma,nevus}, all images of a lesion in one split.
Stand-in set: Kermany's chest X-rays of children, to the NIH's of adults.
Weights: EfficientNet-Lite0's come with an installed package. One seed, to stay within minutes;
--config.adapt.seeds=3 gives verdicts.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """DANN and CDAN+E between the two bounds."""
    config = default.get_config()
    config.experiment = "adapt"
    config.task = "classify"
    config.model.image_size = 64
    config.data.name = "folder"
    config.domain.target.name = "folder"
    config.domain.width = 256
    config.adapt.methods = "source,dann,cdan_e"
    config.adapt.seeds = 1
    config.augment.preset = "dermoscopy"
    config.train.epochs = 1
    config.train.min_steps = 120
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany_to_nih(config, stand_in)
        config.augment.preset = "xray"  # the stand-ins are grey
    return config
