"""Names skin lesions by networks of different topologies and resolutions, fused.

System 4 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/skin_ensemble.py \\
    --config.data.dir=HAM10000/HAM10000_metadata.csv
Stand-in: python launch.py --config=configs/recipes/skin_ensemble.py:SETS
Data: HAM10000 as published: HAM10000_metadata.csv (lesion_id, image_id, dx), the images of its two
archives together in the folder HAM10000/images. A fifth is set aside for test, whole lesions.
Stand-in set: Kermany's chest X-rays: normal or pneumonia.
Weights: those of GoogLeNet and ResNet-18 are downloaded once. Files, and other networks:
--config.ensemble.networks="efficientnet_lite0@64,googlenet_caffe@96=bvlc_googlenet_caffe.npz".
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Three networks at three sizes, one member each."""
    config = default.get_config()
    config.experiment = "ensemble"
    config.task = "classify"
    config.ensemble.networks = "efficientnet_lite0@64,resnet18@80,googlenet@96"
    config.ensemble.members = 1
    config.ensemble.soups = False
    config.data.name = "csv"
    config.data.csv_path_column = "image_id"
    config.data.csv_path_format = "images/{}.jpg"
    config.data.csv_label_column = "dx"
    config.data.csv_split_column = ""
    config.data.csv_patient_column = "lesion_id"
    config.augment.preset = "dermoscopy"
    config.train.epochs = 1
    config.train.min_steps = 120
    config.eval.drift = False
    if stand_in:
        stand_ins.kermany(config, stand_in)
        config.augment.preset = "xray"  # the stand-in is grey
    return config
