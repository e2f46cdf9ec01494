"""Segments the heart in MRI after affine and elastic augmentation.

System 7 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/cardiac_elastic.py \\
    --config.data.dir=ACDC/labels.csv
Stand-in: python launch.py --config=configs/recipes/cardiac_elastic.py:SETS
Data: ACDC: its NIfTI volumes (pip install 'medtl_jax[medical]') and a labels.csv that you write,
with id (patient001/patient001_frame01), split and patient; masks are the files with _gt.
Stand-in set: nuclei under the microscope.
Weights: EfficientNet-Lite0's come with an installed package.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Every stage learns; warps and shading as in the preset of MRI, more elastic than it."""
    config = default.get_config()
    config.task = "segment"
    config.model.image_size = 96
    config.data.name = "csv"
    config.data.batch_size = 16
    config.data.csv_path_column = "id"
    config.data.csv_path_format = "{}.nii.gz"
    config.data.csv_mask_column = "id"
    config.data.csv_mask_format = "{}_gt.nii.gz"
    config.data.csv_patient_column = "patient"
    config.data.classes = "background,right_ventricle,myocardium,left_ventricle"
    config.optim.high.lr = 5e-3
    config.augment.flip_horizontal = 0.0
    config.augment.shift = 0.05
    config.augment.rotate = 15.0
    config.augment.scale = 0.15
    config.augment.shear = 5.0
    config.augment.elastic = 0.03
    config.augment.gamma = 0.3
    config.augment.bias_field = 0.3
    config.train.epochs = 4
    config.train.min_steps = 150
    config.eval.drift = False
    if stand_in:
        stand_ins.nuclei(config, stand_in)
    return config
