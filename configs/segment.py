"""Segments images: an ImageNet CNN as the encoder of a U-Net, fine-tuned with its new decoder.

Command: python launch.py --config=configs/segment.py
Data: the lesions of the embedded phantom; your own are a csv of images and masks (a mask's value is
the class of a pixel, or 0 and 255), with `id` in the place of {}:

    python launch.py --config=configs/segment.py --config.data.name=csv \\
        --config.data.dir=labels.csv --config.data.csv_path_column=id \\
        --config.data.csv_path_format=images/{}.png --config.data.csv_mask_column=id \\
        --config.data.csv_mask_format=masks/{}.png --config.data.classes=background,nucleus

Expected on 460 images of nuclei at 256 px: Dice 0.88 (from scratch 0.87), trained in 22 minutes
on 2 busy CPU cores; more in experiments/results/tasks.md. Flips in both directions are on: set
them to 0 where the direction matters, or name the modality, as in --config.augment.preset=mri.
"""

from configs import default


def get_config():
    """Every stage learns, the encoder slowly."""
    config = default.get_config()
    config.task = "segment"
    config.data.batch_size = 8
    config.optim.high.lr = 5e-3
    config.augment.flip_vertical = 0.5
    config.augment.shift = 0.05
    config.train.epochs = 8
    config.train.min_steps = 400
    config.eval.batch_size = 16
    return config
