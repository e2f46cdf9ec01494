"""Trains a network from scratch on a source set, for transfer to another: LeNet-5 on MNIST.

Command: python launch.py --config=configs/pretrain.py --config.data.dir=mnist.npz --workdir=SOURCE
Data: Keras's mnist.npz, or any set that configs/default.py names; other networks with
--config.model.name=NAME (python -m medtl_jax.models lists them).
Expected: test accuracy 0.99 in under 2 minutes on 2 CPU cores. More augmentation (shift 0.15,
brightness 0.2, contrast 0.3) gives weights that are worse on MNIST and better to carry over:
experiments/results/families.md.

The run writes SOURCE/weights.safetensors. Carried over to another set of few images, 10 a class:

    python launch.py --config=configs/pretrain.py --config.model.weights=SOURCE \\
        --config.data.dir=usps.npz --config.data.per_class=10 --config.data.batch_size=32 \\
        --workdir=TARGET

Scores on labelled images, and a table of probabilities for images without labels (data.dir then
is a folder of them, or one file), by the best checkpoint of either run:

    python launch.py --config=configs/pretrain.py --config.experiment=evaluate \\
        --config.eval.run=TARGET --config.data.dir=usps.npz --workdir=SCORES
    python launch.py --config=configs/pretrain.py --config.experiment=predict \\
        --config.eval.run=TARGET --config.data.dir=IMAGES --workdir=TABLE
"""

from configs import default


def get_config():
    """From scratch, without flips: digits have a left and a right."""
    config = default.get_config()
    config.model.name = "lenet5"
    config.model.weights = "none"
    config.model.image_size = 28
    config.data.name = "npz"
    config.data.batch_size = 64
    config.data.val_fraction = 0.1  # of 10 a class, one of each
    config.optim.high.lr = 2e-3
    config.augment.flip_horizontal = 0.0
    config.augment.brightness = 0.0
    config.augment.contrast = 0.0
    config.augment.shift = 0.05
    config.train.epochs = 10
    config.train.ema = 0.99
    config.train.select = "loss"
    config.eval.batch_size = 500
    return config
