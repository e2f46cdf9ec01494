"""Fine-tunes an ImageNet CNN: early stages frozen, later ones slowly, the new head fast.

Command: python launch.py --config=configs/finetune.py
Data: the embedded phantom; your own with --config.data.name=folder --config.data.dir=DIR.
"""

from configs import default


def get_config():
    """The defaults are this study."""
    return default.get_config()
