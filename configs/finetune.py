"""Fine-tunes an ImageNet CNN: early stages frozen, later ones slowly, the new head fast.

Command: python launch.py --config=configs/finetune.py
Data: the embedded phantom; your own with --config.data.name=folder --config.data.dir=DIR, which
holds PNG, JPEG, DICOM or NIfTI files in class folders (keys window, plane, slices of config.data).
Expected on the phantom: test accuracy 0.87, AUC 0.977 (mean of 3 seeds; without pretrained
weights 0.29 and 0.53), in about 2 minutes on 2 CPU cores. More in experiments/results/finetune.md.
Left-right flips are on: set augment.flip_horizontal=0 where laterality matters, or name the
modality, as in --config.augment.preset=xray.
"""

from configs import default


def get_config():
    """The defaults are this study."""
    return default.get_config()
