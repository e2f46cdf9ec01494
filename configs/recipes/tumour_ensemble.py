"""Segments brain tumours by networks of different initialisations, their outputs fused.

System 8 of the survey (RJCSE 4(2), 2023, Table 1).
Command: python launch.py --config=configs/recipes/tumour_ensemble.py \\
    --config.data.dir=BraTS/labels.csv
Stand-in: python launch.py --config=configs/recipes/tumour_ensemble.py:SETS
Data: BraTS: axial slices of one sequence that you store as BraTS/images/ID.png, the whole tumour as
BraTS/masks/ID.png (0 and 255), and a labels.csv with id, split and patient.
Stand-in set: nuclei under the microscope.
Weights: EfficientNet-Lite0's come with an installed package; decoders and heads are drawn anew in
each member.
"""

from configs import default
from configs.recipes import stand_ins


def get_config(stand_in=""):
    """Three members by their seeds, fused by means, votes and STAPLE."""
    config = default.get_config()
    config.experiment = "ensemble"
    config.task = "segment"
    config.model.image_size = 64
    config.data.name = "csv"
    config.data.batch_size = 16
    config.data.csv_path_column = "id"
    config.data.csv_path_format = "images/{}.png"
    config.data.csv_mask_column = "id"
    config.data.csv_mask_format = "masks/{}.png"
    config.data.csv_patient_column = "patient"
    config.data.classes = "background,tumour"
    config.ensemble.members = 3
    config.ensemble.soups = False
    config.optim.high.lr = 5e-3
    config.augment.preset = "mri"
    config.train.epochs = 4
    config.train.min_steps = 120
    config.eval.drift = False
    if stand_in:
        stand_ins.nuclei(config, stand_in)
    return config
