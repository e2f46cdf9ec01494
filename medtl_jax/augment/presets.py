"""Augmentation by modality: strengths for its usual labels, and which labels they would change."""

import dataclasses
from collections.abc import Mapping, Set
from types import MappingProxyType

from medtl_jax.errors import UserError

TRANSFORMS = (
    "flip_horizontal",
    "flip_vertical",
    "quarter_turns",
    "shift",
    "rotate",
    "scale",
    "shear",
    "crop",
    "elastic",
    "brightness",
    "contrast",
    "gamma",
    "hue",
    "saturation",
    "stain",
    "bias_field",
    "clahe",
    "equalize",
    "blur",
    "noise",
    "cutout",
)
"""The keys of `config.augment` that a preset sets, in the order in which an image passes them."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Strengths of the transforms that a modality allows, and a note on label safety.

    A transform that is not in `strengths` is off.
    """

    note: str
    strengths: Mapping[str, float]


def _preset(note: str, **strengths: float) -> Preset:
    return Preset(note, MappingProxyType(strengths))


PRESETS = MappingProxyType(
    {
        "xray": _preset(
            "No flips: the heart lies on the left and side markers would read backwards. For "
            "images without a side, such as a single bone, flip_horizontal=0.5 is safe.",
            shift=0.05,
            rotate=10.0,
            scale=0.1,
            shear=5.0,
            elastic=0.01,
            brightness=0.1,
            contrast=0.2,
            gamma=0.2,
            noise=0.02,
            blur=0.006,
            bias_field=0.1,
        ),
        "ct": _preset(
            "No flips: liver and heart have a side. Grey values are densities, so brightness and "
            "contrast change little; set them to 0 where a label depends on the density itself.",
            shift=0.05,
            rotate=10.0,
            scale=0.1,
            shear=3.0,
            elastic=0.01,
            brightness=0.03,
            contrast=0.1,
            gamma=0.1,
            noise=0.03,
            blur=0.006,
        ),
        "mri": _preset(
            "No flips: a lesion may be reported by its side. Grey values have no unit and coils "
            "shade the image, so intensities change freely; where a label is the brightness of a "
            "tissue against another, lower gamma and bias_field.",
            shift=0.05,
            rotate=10.0,
            scale=0.1,
            shear=3.0,
            elastic=0.015,
            brightness=0.1,
            contrast=0.3,
            gamma=0.3,
            noise=0.03,
            blur=0.006,
            bias_field=0.3,
        ),
        "ultrasound": _preset(
            "Never upside down: depth, shadows and enhancement run downwards. No left-right flips, "
            "as heart and liver views have a side; for lesions alone, as in the breast, "
            "flip_horizontal=0.5 is safe.",
            shift=0.05,
            rotate=5.0,
            scale=0.1,
            shear=3.0,
            elastic=0.01,
            brightness=0.15,
            contrast=0.3,
            gamma=0.3,
            noise=0.04,
            blur=0.008,
            bias_field=0.2,
        ),
        "fundus": _preset(
            "A mirrored left eye looks like a right one: set both flips to 0 where the label is "
            "the eye, or a place such as temporal or nasal. Small lesions are the grade, so there "
            "is hardly any blur and no cutout, and their red is kept.",
            flip_horizontal=0.5,
            flip_vertical=0.5,
            shift=0.05,
            rotate=30.0,
            scale=0.1,
            brightness=0.1,
            contrast=0.2,
            gamma=0.2,
            hue=0.01,
            saturation=0.1,
            noise=0.01,
            blur=0.003,
            bias_field=0.1,
        ),
        "dermoscopy": _preset(
            "A lesion has no upright, so flips and turns are safe. Its colours and its asymmetry "
            "are what is diagnosed: hue changes little, and there is neither shear, nor elastic "
            "deformation, nor cutout.",
            flip_horizontal=0.5,
            flip_vertical=0.5,
            quarter_turns=0.75,
            shift=0.05,
            rotate=20.0,
            scale=0.15,
            brightness=0.1,
            contrast=0.2,
            hue=0.015,
            saturation=0.15,
            noise=0.01,
            blur=0.006,
        ),
        "histology": _preset(
            "Tissue has no upright, so flips and turns are safe. Colours vary by stain, drawn per "
            "haematoxylin and eosin, not by hue; for other stains than these set stain=0. Scale "
            "changes little: the size of a nucleus is a finding.",
            flip_horizontal=0.5,
            flip_vertical=0.5,
            quarter_turns=0.75,
            shift=0.05,
            scale=0.05,
            elastic=0.01,
            brightness=0.1,
            contrast=0.15,
            stain=0.05,
            noise=0.02,
            blur=0.006,
        ),
        "photographs": _preset(
            "For colour photographs of the body's surface or of objects: set flip_horizontal=0 "
            "where left and right, or letters, matter, and hue, saturation and cutout to 0 where a "
            "small or coloured detail is the label.",
            flip_horizontal=0.5,
            shift=0.05,
            rotate=10.0,
            shear=5.0,
            crop=0.3,
            brightness=0.2,
            contrast=0.3,
            hue=0.03,
            saturation=0.3,
            noise=0.02,
            blur=0.006,
            cutout=0.25,
        ),
    }
)


def find_preset(name: str) -> Preset:
    """The preset called `name`. UserError with all names if there is none."""
    if name not in PRESETS:
        raise UserError(f"augment.preset={name!r} is not known; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def fill_preset(augment: Mapping, given: Set[str] = frozenset()) -> dict:
    """`config.augment` with the strengths of its preset, where it has one.

    Args:
      augment: `config.augment`. Mixing and RandAugment are no preset's business and stay.
      given: the keys of it (`"shift"`) that the user has set, which stay too.

    Raises:
      UserError: as `find_preset`.
    """
    if not augment["preset"]:
        return dict(augment)
    strengths = find_preset(augment["preset"]).strengths
    filled = {name: strengths.get(name, 0.0) for name in TRANSFORMS if name not in given}
    return {**augment, **filled}
