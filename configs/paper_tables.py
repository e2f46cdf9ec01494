"""A paper's tables on your images: CNNs from scratch, pretrained ones and traditional classifiers.

Command: python launch.py --config=configs/paper_tables.py --workdir=TABLES
Data: the embedded phantom; your own as in configs/finetune.py, one label an image. The pretrained
networks need weights; those of files are named by their paths, as GoogLeNet's by its authors and
VGG-16's without its classifier:

    python launch.py --config=configs/paper_tables.py --workdir=TABLES --config.paper.seeds=3 \\
        --config.paper.networks=baseline_cnn=none,lenet5=none,alexnet=none,efficientnet_lite0=imagenet,googlenet_caffe=FILE.npz,vgg16_gap=FILE.npz

What comes out: TABLES/paper_tables.md, accuracy, precision, recall, specificity and F1 (Table 2),
Dice, IoU, MAE and MSE (Table 3), with 95 % intervals over seeds and test images; the same with bar
charts and confusion matrices (figures 6 to 9) in report.html and TABLES/figures, and a csv that was
passed through `python -m medtl_jax.metrics check`. TABLES/cells has a run folder for each model and
seed: tables that were interrupted go on with the same command, and several processes share them.

The networks classify whole images: Dice equals F1 here, and MAE and MSE are of the probability of
the positive class. Left-right flips are on: set augment.flip_horizontal=0 where laterality matters.

Minutes on 2 CPU cores at 64 px with 3 seeds: about 25, most of it GoogLeNet and VGG-16.
"""

from configs import default


def get_config():
    """Three seeds, the training of configs/finetune.py, at 64 px."""
    config = default.get_config()
    config.experiment = "paper_tables"
    config.model.image_size = 64
    config.eval.drift = False
    return config
