"""Views and corruptions that cannot be had: one line, exit code 2, nothing written."""

import pytest
from mistake_commands import set_keys

from medtl_jax.augment.presets import TRANSFORMS

STILL = {f"augment__{name}": 0.0 for name in TRANSFORMS}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval__tta": 1}, "eval.tta=1 would be the image alone; set 0 for that, or 2 or more"),
        ({"eval__tta": -2}, "eval.tta=-2 must be at least 0"),
        ({"eval__tta": 5000}, "eval.tta=5000 must be at least 0 and at most 1000"),
        ({"eval__tta": 4, **STILL}, "eval.tta=4 draws views by transforms of the section augment"),
        ({"eval__tta": 4, "augment__preset": "xrays"}, "xrays"),
        (
            {"eval__tta": 4, "task": "segment", **STILL, "augment__rotate": 5.0},
            "draws views by flips, quarter turns and intensities, all that masks can be moved",
        ),
        ({"eval__corruptions": "some"}, "corruptions"),
        *(
            (
                {"experiment": name, key: value, "model__weights": "none"},
                f"{key.replace('__', '.')}={value} is for experiment={by}, not for {name}; leave",
            )
            for name, key, value, by in (
                ("ladder", "eval__tta", 4, "finetune, evaluate and predict"),
                ("extract", "eval__corruptions", True, "finetune and evaluate"),
                ("predict", "eval__corruptions", True, "finetune and evaluate"),
            )
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(refusal, settings, words):
    message = refusal(*set_keys(**settings))
    assert words in message, message
