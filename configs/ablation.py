"""What each setting changes: any keys of the config x seeds on the same splits, one table.

Command: python launch.py --config=configs/ablation.py --workdir=ABLATION
Data: the embedded phantom; your own as in configs/finetune.py. The axes are keys of the config with
their values, or names with settings by their labels; the first of each is the reference:

    python launch.py --config=configs/ablation.py --workdir=ABLATION --config.ablation.seeds=5 \\
        --config.ablation.axes='{"optim.high.lr": [0.001, 0.002], "augmentation": {
            "none": {"augment.flip_horizontal": 0.0, "augment.shift": 0.0},
            "xray": {"augment.preset": "xray"}}}'

A row that sets `ensemble.members` trains so many networks for each seed, on the same images, and
predicts the mean of their probabilities; the first of them is the network of the row without. The
layers of a method, its ensemble included, are then switched on and off in one table:

        --config.ablation.axes='{
            "groups": {"off": {"transfer.strategy": "full"}, "on": {"transfer.strategy": "groups"}},
            "L_pre": {"off": {}, "on": {"transfer.pretrain_loss": "l2sp", "transfer.alpha": 0.01}},
            "ensemble": {"one": {}, "three": {"ensemble.members": 3}}}'

`ablation.design=grid` trains all combinations, `one` those that differ from the reference on one
axis. What a row sets wins over what the study or the command line has.

What comes out: ABLATION/ablation.md, the table with 95 % intervals, and verdicts against the
reference, paired by seed and test image, after Holm's correction; the same with a figure and the
command of each run in report.html, all numbers in ablation.json. ABLATION/cells has a run folder
for each combination, named by a hash of its config, images and weights: with the same command an
ablation that was interrupted goes on, and one whose axes, settings or images have changed trains
what has changed alone. The same command in several processes, or on several machines that share
the folder, shares the runs among them.

Left-right flips are on: set augment.flip_horizontal=0 where laterality matters.
"""

import json

from configs import default

AXES = {
    "transfer.bn.low": ["train", "freeze"],
    "augmentation": {
        "usual": {},
        "none": {
            "augment.flip_horizontal": 0.0,
            "augment.shift": 0.0,
            "augment.brightness": 0.0,
            "augment.contrast": 0.0,
        },
    },
}


def get_config():
    """Short runs, for a laptop without a GPU."""
    config = default.get_config()
    config.experiment = "ablation"
    config.model.image_size = 64
    config.ablation.axes = json.dumps(AXES)
    config.ablation.design = "one"
    config.train.epochs = 3
    config.train.min_steps = 100
    config.train.epoch_steps = 25  # a few images are not validated after every pass
    config.eval.drift = False
    return config
