"""Members that differ by their seeds, of one network or several, fused: is that a gain?

Command: python launch.py --config=configs/ensemble.py --workdir=ENSEMBLE
Data: the embedded phantom; your own as in configs/finetune.py. One network with more members, or
networks of other kinds and image sizes, each with so many:

    python launch.py --config=configs/ensemble.py --workdir=ENSEMBLE --config.ensemble.members=8
    python launch.py --config=configs/ensemble.py --workdir=MIXED --config.ensemble.members=2 \\
        --config.ensemble.networks="efficientnet_lite0@128, googlenet@160, resnet18@112=WEIGHTS"

Members may differ in settings too, by a list with one value for each member of a network:

        --config.ensemble.arrays='{"optim.high.lr": [0.001, 0.002, 0.004]}'

All members learn from the same images (data.seed_draw); a seed is another head, order, augmentation
and dropout.

What comes out: ENSEMBLE/ensemble.md, the table of members, fusions and soups with 95 % intervals,
the gain of each over the best single member (paired by test image, after Holm's correction), and
what an image costs; the same with figures of diversity, calibration and rejection and the command
of each member in report.html, all numbers in ensemble.json, and what the picked fusion predicts in
predictions.npz: `python -m experiments.compare ENSEMBLE RUN` compares it with a run. Fusions are
fitted and picked on validation alone. ENSEMBLE/cells has a run folder for each member, named by a
hash of its config, images and weights: with the same command an ensemble that was interrupted goes
on, and with more members only these are trained. The same command in several processes, or on
several machines that share the folder, shares the members among them.

Left-right flips are on: set augment.flip_horizontal=0 where laterality matters.
"""

from configs import default


def get_config():
    """Short runs, for a laptop without a GPU."""
    config = default.get_config()
    config.experiment = "ensemble"
    config.model.image_size = 64
    config.train.epochs = 3
    config.train.min_steps = 100
    config.train.epoch_steps = 25  # a few images are not validated after every pass
    config.eval.drift = False
    return config
