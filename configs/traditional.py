"""Classifies as before CNNs: HOG, LBP or raw pixels with logistic regression, SVM or a forest.

Command: python launch.py --config=configs/traditional.py --config.traditional.features=hog \\
             --config.traditional.classifier=svm
Data: the embedded phantom; your own as in configs/finetune.py.

Splits, metrics, intervals, calibration and report are those of a network's run, so that the two can
be compared:

    python -m experiments.compare RUN RUN

As rows of a ladder or of an ablation (`transfer.strategy`) the nine are called hog_svm, lbp_forest,
pixels_logistic and so on:

    python launch.py --config=configs/ladder.py --config.ladder.strategies=probe,full,hog_svm

Hyper-parameters are chosen on validation from a small grid (medtl_jax/traditional/classifiers.py).
The descriptors of an image are computed once and kept in `transfer.cache_dir`. Images are not
augmented. The model itself is not kept, so that `predict` and `evaluate` refuse such a run.

Expected: experiments/results/traditional.md.
"""

from configs import default


def get_config():
    """HOG and an SVM."""
    config = default.get_config()
    config.experiment = "traditional"
    config.model.weights = "none"
    return config
