"""Finds several findings in an image at once, each present or not, some labels unknown.

Command: python launch.py --config=configs/multilabel.py
Data: the embedded phantom; your own are a csv with a column of 0, 1 or nothing (unknown) for
each finding, and patients where they are known:

    python launch.py --config=configs/multilabel.py --config.data.name=csv \\
        --config.data.dir=labels.csv --config.data.csv_label_column=Effusion,Edema,Nodule \\
        --config.data.csv_patient_column=patient

Expected on 696 chest X-rays: mean AUC 0.87 over the findings with 20 or more positives in
6 minutes on 2 busy CPU cores; more in experiments/results/tasks.md. Left-right flips are off: the
heart has a side.
"""

from configs import default


def get_config():
    """Balanced weights: most findings are rare."""
    config = default.get_config()
    config.task = "multilabel"
    config.augment.flip_horizontal = 0.0
    config.train.class_weights = "balanced"
    config.train.epochs = 6
    config.train.min_steps = 250
    return config
