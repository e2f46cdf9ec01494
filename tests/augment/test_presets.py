"""Presets: values that can be used, flips only where they are safe, and what a user set stays."""

import jax
import numpy as np
import pytest

from configs import default
from medtl_jax.augment.intensity import COLOUR
from medtl_jax.augment.policy import LIMITS, active_transforms, check_channels, make_augment
from medtl_jax.augment.presets import PRESETS, TRANSFORMS, fill_preset, find_preset
from medtl_jax.errors import UserError

GREY = ("xray", "ct", "mri", "ultrasound")
COLOURED = ("fundus", "dermoscopy", "histology", "photographs")


def config(**settings):
    return {**default.get_config().augment.to_dict(), **settings}


def test_the_modalities():
    assert tuple(PRESETS) == GREY + COLOURED


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_policy_of_its_images(name):
    preset, channels = PRESETS[name], 1 if name in GREY else 3
    assert all(0 < strength <= LIMITS[key] for key, strength in preset.strengths.items())
    filled = fill_preset(config(preset=name))
    assert active_transforms(filled) == preset.strengths
    check_channels(filled, channels)
    image = jax.ShapeDtypeStruct((2, 32, 32, channels), np.uint8)
    found, _ = jax.eval_shape(make_augment(filled), jax.random.key(0), image)
    assert found.shape == image.shape
    # Enough is on for RandAugment, and the note is one line of sentences.
    make_augment({**filled, "randaugment": 3})
    assert preset.note.endswith(".") and "\n" not in preset.note and len(preset.note) < 400


def test_where_left_and_right_matter_nothing_is_flipped():
    for name in GREY:
        flips = {"flip_horizontal", "flip_vertical", "quarter_turns"}
        assert not flips & PRESETS[name].strengths.keys()
        assert "flips" in PRESETS[name].note
        assert not COLOUR & PRESETS[name].strengths.keys()
    # Colours that are the diagnosis hardly move.
    for name in ("fundus", "dermoscopy"):
        assert PRESETS[name].strengths["hue"] < 0.02
    assert "stain" in PRESETS["histology"].strengths


def test_a_preset_sets_what_the_user_did_not():
    mixing = {"mixup": 0.2, "randaugment": 2}
    given = config(preset="xray", shift=0.2, flip_horizontal=0.5, hue=0.1, **mixing)
    found = fill_preset(given, {"shift", "flip_horizontal", "preset", "mixup"})
    strengths = PRESETS["xray"].strengths
    assert found["shift"] == 0.2 and found["flip_horizontal"] == 0.5
    assert found["rotate"] == strengths["rotate"] and found["hue"] == 0.0
    assert found["preset"] == "xray" and found["mixup"] == 0.2 and found["randaugment"] == 2
    assert found.keys() == given.keys()
    # The strengths of a study's file are not the user's own.
    assert fill_preset(given)["flip_horizontal"] == 0.0
    assert given["shift"] == 0.2 and given["hue"] == 0.1


def test_without_a_preset_nothing_changes():
    assert fill_preset(config(rotate=3.0)) == config(rotate=3.0)


def test_an_unknown_preset_is_one_line_with_all_of_them():
    with pytest.raises(UserError) as refused:
        fill_preset(config(preset="chest"))
    assert str(refused.value) == (
        "augment.preset='chest' is not known; choose from xray, ct, mri, ultrasound, fundus, "
        "dermoscopy, histology, photographs"
    )
    with pytest.raises(UserError, match="'chest' is not known"):
        make_augment(config(preset="chest"))
    assert find_preset("ct") is PRESETS["ct"] and len(TRANSFORMS) == len(set(TRANSFORMS))
