"""Adapts to a target without labels: which method, from runs of methods x seeds on the same data.

Command: python launch.py --config=configs/adversarial.py --workdir=ADAPTED
Data: two scanners of the embedded phantom. Your own: a source with labels and a target of the same
classes, whose labels, where it has some, only score (without: --config.adapt.supervised=False):

    python launch.py --config=configs/adversarial.py --workdir=ADAPTED --config.data.name=folder \\
        --config.data.dir=CHILDREN --config.domain.target.name=folder \\
        --config.domain.target.dir=ADULTS --config.adapt.methods=source,dsbn,dann,dann@0.3,mmd

The methods are those of experiments/adapt_methods.py. Digits from one set to another by a small
network without pretrained weights:

    python launch.py --config=configs/pretrain.py --config.experiment=adapt --workdir=DIGITS \\
        --config.model.name=lenet5_bn --config.data.dir=mnist.npz --config.domain.target.name=npz \\
        --config.domain.target.dir=usps.npz --config.domain.width=256 --config.adapt.seeds=5 \\
        --config.adapt.methods=source,dsbn,dann,cdan_e,cdan_e+mcc,mmd,coral

What comes out: ADAPTED/adaptation.md, the table with 95 % intervals and verdicts against training
on the source alone, beside the bound that learns from the target's labels; the same with the
features of both domains and the discriminators' accuracy in report.html, all numbers in
adaptation.json. The epoch of each run, and then the method, are chosen by domain.select without
labels of the target; what its labels would choose is shown as the oracle, and used for nothing.
ADAPTED/cells has a run folder for each combination. What was interrupted goes on with the same
command, and methods or seeds that are added in the same --workdir are trained alone.

On the phantom, one seed, two of the methods: target accuracy 0.38 of the source alone (0.51 on
its own scanner) in 34 CPU seconds, and 0.46 with batch statistics of each domain's own (dsbn) in
49. On digits the method picked, cdan_e+mcc, has 0.957 from MNIST to USPS (source alone 0.947) and
0.961 back (0.750), with the settings of experiments/results/adaptation.md. On X-rays of children
and adults, and on nuclei in fluorescence and in stained tissue, no method helps, and the one picked
is no better than none. A method took about 150 CPU seconds a seed on digits, 140 on X-rays.

Left-right flips are on: set augment.flip_horizontal=0 where laterality matters.
"""

from configs import default


def get_config():
    """Short runs at 64 pixels, for a laptop without a GPU."""
    config = default.get_config()
    config.experiment = "adapt"
    config.model.image_size = 64
    # A scanner changes what the first stages see.
    config.transfer.strategy = "full"
    config.domain.target.name = "phantom"
    config.domain.width = 256
    config.adapt.methods = "source,adabn,dsbn,dann,cdan_e,coral"
    config.train.epochs = 4
    config.train.min_steps = 100
    config.eval.drift = False
    return config
