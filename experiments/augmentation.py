"""What a run does to its training images: checked, told, and shown."""

import dataclasses
from collections.abc import Mapping, Set

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.settings import default_section
from medtl_jax.augment.mix import Mix, check_mix, make_mix, mix_batch
from medtl_jax.augment.policy import active_transforms, check_channels, make_augment
from medtl_jax.augment.presets import TRANSFORMS, fill_preset, find_preset
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.keys import named_key
from medtl_jax.models.inputs import enhance
from medtl_jax.report.augmentation import Sheet, contact_sheet
from medtl_jax.training.views import check_views

_SECTION = "augment."
_IMAGES, _DRAWS = 4, 6


def with_preset(config: dict, given: Set[str]) -> dict:
    """`config` with the strengths of `augment.preset`, but for those of `given` keys."""
    own = {key.removeprefix(_SECTION) for key in given if key.startswith(_SECTION)}
    return {**config, "augment": fill_preset(config["augment"], own)}


def resolve_augmentation(config: dict, given: Set[str]) -> dict:
    """As `with_preset`, `given` by the command line.

    A note is printed of each strength that the study's file has changed and the preset overwrites:
    afterwards nobody could tell.
    """
    filled = with_preset(config, given)
    before, after, usual = config["augment"], filled["augment"], default_section("augment")
    for name, strength in after.items():
        if before[name] not in (strength, usual[name]):
            Console().note(
                f"note: augment.{name}={before[name]} of the study's file is not used: "
                f"augment.preset={after['preset']} sets it to {strength}; set it on the command "
                "line to keep it"
            )
    return filled


def check_augmentation(config: dict) -> None:
    """UserError for an augmentation that no data could be trained with, or that has no views."""
    active_transforms(config["augment"])
    check_views(config["augment"], config["eval"]["tta"], config["task"] == "segment")
    if config["task"]:
        check_mix(config["augment"], config["task"])


def check_for_data(config: dict, dataset: Dataset) -> None:
    """UserError for an augmentation that these images, or their targets, do not allow."""
    check_mix(config["augment"], dataset.spec.task)
    check_channels(config["augment"], dataset.splits["train"].images.shape[-1])
    check_views(config["augment"], config["eval"]["tta"], dataset.spec.task == "segment")


def keeps_features(config: dict) -> bool:
    """Whether what is made of the training images is kept, and the images are not drawn anew."""
    return (
        config["experiment"] in ("extract", "traditional")
        or config["transfer"]["cache"] == "prefix"
    )


def mixing(config: dict) -> Mix | None:
    """How the images of a batch are mixed; None where they are not, or where features are kept."""
    return None if keeps_features(config) else make_mix(config["augment"])


def augments_training(config: dict) -> bool:
    """Whether training images are drawn by `config.augment`, and not kept as they are."""
    return not keeps_features(config) or config["transfer"]["views"] > 0


def _drawn(config: dict) -> dict:
    """`config.augment`; nothing of it where features of the images as they are are kept."""
    return config["augment"] if augments_training(config) else {}


def augmentation_lines(config: dict) -> list[str]:
    """What is done to each training image, a line each; the last is a note on labels, if any.

    Empty where nothing is done.
    """
    augment, mix, contrast = config["augment"], mixing(config), config["model"]["contrast"]
    on = active_transforms(_drawn(config))
    lines = []
    if on:
        lines.append(f"Transforms{_preset_words(augment)}: {_listed(on)}.")
    if on and augment["randaugment"]:
        lines.append(
            f"RandAugment: {augment['randaugment']} of them for each image, flips, turns and crop "
            "aside."
        )
    if mix:
        alphas = {name: value for name, value in dataclasses.asdict(mix).items() if value}
        shown = " or ".join(f"{name} (alpha {value:g})" for name, value in alphas.items())
        lines.append(f"Images of a batch are mixed in pairs: {shown}.")
    if contrast != "none":
        lines.append(f"Contrast of every image, also of those to predict: {contrast}.")
    if on and augment["preset"]:
        lines.append(f"Labels: {find_preset(augment['preset']).note}{_not_of_note(augment)}")
    elif on.get("flip_horizontal"):
        lines.append(
            "Labels: left and right are swapped in mirrored images; where a label depends on the "
            "side, such as that of the heart or the eye, set augment.flip_horizontal=0."
        )
    return lines


def _listed(strengths: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {strength:g}" for name, strength in strengths.items())


def _changed(augment: dict) -> dict[str, float]:
    """The strengths of `config.augment` that are not those of its preset."""
    own = fill_preset(augment)
    return {name: augment[name] for name in TRANSFORMS if augment[name] != own[name]}


def _preset_words(augment: dict) -> str:
    if not augment["preset"]:
        return ""
    changed = f", but for {', '.join(found)}" if (found := _changed(augment)) else ""
    return f" (preset {augment['preset']}{changed})"


def _not_of_note(augment: dict) -> str:
    """What a preset's note on labels does not know of."""
    changed = _changed(augment)
    if not changed:
        return ""
    return f" This is said of the preset as it is; here it was changed to {_listed(changed)}."


def say_augmentation(config: dict, console: Console) -> None:
    """Prints what is done to the training images, and what was asked for and is not."""
    for line in augmentation_lines(config):
        console.note(f"augmentation: {line}")
    if not keeps_features(config):
        return
    if not config["transfer"]["views"] and active_transforms(config["augment"]):
        console.note("note: cached features are not augmented; set transfer.views for that")
    if mix := make_mix(config["augment"]):
        name = "mixup" if mix.mixup else "cutmix"
        console.note(f"note: augment.{name} has no effect: cached features are not mixed")


def draw_sheet(config: dict, train: Split) -> Figure:
    """The contact sheet: some training images, as some steps would see them.

    A column is a batch of these images, augmented and mixed as the step does it; they are drawn as
    the network reads them.
    """
    # Spread over the split, whose order is often that of the classes.
    rows = np.unique(np.linspace(0, len(train) - 1, _IMAGES).round().astype(int))
    images, target = np.asarray(train.images[rows]), np.asarray(train.target[rows])
    columns = _draws(config, images, target)
    masked = target.ndim == 3
    shown = [np.asarray(image).round().clip(0, 255).astype(np.uint8) for image, _ in columns]
    sheet = Sheet(
        images=images,
        draws=np.stack(shown, axis=1),
        ids=train.ids[rows],
        masks=target if masked else None,
        moved=np.stack([np.asarray(mask) for _, mask in columns], axis=1) if masked else None,
        mixed=mixing(config) is not None,
    )
    return contact_sheet(sheet)


def _draws(config: dict, images: np.ndarray, target: np.ndarray):
    """`(images, targets)` of each column."""
    augment, mix = make_augment(_drawn(config)), mixing(config)
    contrast = config["model"]["contrast"]

    @jax.jit
    def draw(key, images, target):
        masks = target if target.ndim == 3 else None
        images, masks = augment(named_key(key, "augment"), images, masks)
        images = enhance(images, contrast)
        batch = {"image": images, "target": target if masks is None else masks}
        if mix is not None:
            batch = mix_batch(named_key(key, "mixup"), batch, mix)
        return batch["image"], batch["target"]

    key = jax.random.key(config["seed"])
    return [draw(jax.random.fold_in(key, step), images, target) for step in range(_DRAWS)]
