"""Reads numbers from images: an age, a count, an area; several at once where there are several.

Command: python launch.py --config=configs/regress.py
Data: the area of the lesion in the embedded phantom; your own are a csv with a column of numbers
for each target, empty where unknown:

    python launch.py --config=configs/regress.py --config.data.name=csv \\
        --config.data.dir=labels.csv --config.data.csv_label_column=age \\
        --config.data.csv_patient_column=patient

Expected for the age on 696 chest X-rays: MAE 8.7 years (guessing the mean 13.6) in 9 minutes on 2
busy CPU cores; more in experiments/results/tasks.md. Targets are standardised inside; metrics and
predictions are in their own units.
"""

from configs import default


def get_config():
    """More epochs than a classification: numbers take longer to fit."""
    config = default.get_config()
    config.task = "regress"
    config.train.epochs = 10
    config.train.min_steps = 400
    return config
