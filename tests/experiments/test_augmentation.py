"""What a config makes of the augmentation: presets, refusals, what a run says, shows and keeps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digit_runs import make_request, run, scores, tensors

from medtl_jax import runs
from medtl_jax.augment.presets import PRESETS, TRANSFORMS
from medtl_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("small_runs")


def request(tmp_path, five, **settings):
    return make_request(tmp_path / "run", five, None, model__weights="none", **settings)


def augment(tmp_path, five, **settings):
    return request(tmp_path, five, **settings).config["augment"]


# ---- presets -----------------------------------------------------------------------------------


def test_the_resolved_config_has_the_numbers_of_the_preset(five, tmp_path):
    found = augment(tmp_path, five, augment__preset="xray", augment__shift=0.2, augment__mixup=0.1)
    wanted = {**dict.fromkeys(TRANSFORMS, 0.0), **PRESETS["xray"].strengths, "shift": 0.2}
    assert {name: found[name] for name in TRANSFORMS} == wanted
    assert found["preset"] == "xray" and found["mixup"] == 0.1 and found["cutmix"] == 0.0


def test_the_command_line_is_stronger_than_a_preset(launch, tmp_path):
    """The study has flips; the preset takes them away, unless the command line has them."""
    study = "--config=configs/segment.py"
    preset = "--config.augment.preset=mri"
    for flags, wanted in (([], 0.0), (["--config.augment.flip_vertical=0.5"], 0.5)):
        options, settings = launch._parse_options(["launch.py", study, preset, *flags])
        config, given = launch._apply_settings(launch._load_study(options.config), settings)
        from experiments import finetune

        found = finetune.resolve(config, given)["augment"]
        assert found["flip_vertical"] == wanted and found["flip_horizontal"] == 0.0
        assert found["rotate"] == PRESETS["mri"].strengths["rotate"]


def test_a_ladder_has_the_numbers_of_the_preset_in_every_run(five, tmp_path):
    from experiments import ladder
    from experiments.ladder_cells import make_cells

    config = request(tmp_path, five, augment__rotate=2.0).config
    asked = {**config["augment"], "preset": "xray"}
    plan = {**config["ladder"], "strategies": "scratch,full", "reference": "full", "seeds": 1}
    config = {**config, "experiment": "ladder", "augment": asked, "ladder": plan}
    found = ladder.resolve(config, {"augment.rotate", "augment.preset"})
    assert found["augment"]["rotate"] == 2.0 and found["augment"]["shift"] == 0.05
    # What was given is not known any more where the cells are made.
    for cell in make_cells(found):
        assert cell.resolved["augment"] == found["augment"]


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"augment__rotate": 200.0}, "augment.rotate=200.0 must lie in 0..180"),
        ({"augment__mixup": -1.0}, "augment.mixup=-1.0 must lie in 0..100"),
        ({"augment__randaugment": 1}, "augment.randaugment=1 must be 0 or at most"),
        ({"augment__preset": "fundus"}, "augment.hue, augment.saturation would change colours"),
        ({"model__contrast": "sharpen"}, "model.contrast='sharpen'.* none, equalize, clahe"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(five, tmp_path, settings, words):
    from experiments import finetune

    with pytest.raises(UserError, match=words) as refused:
        finetune.run(request(tmp_path, five, **settings))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_an_unknown_preset_is_refused(five, tmp_path):
    with pytest.raises(UserError, match=r"augment.preset='chest' is not known; choose from xray"):
        augment(tmp_path, five, augment__preset="chest")


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(five, tmp_path_factory):
    """A run with a preset, both kinds of mixing and equalised images, and what it said."""
    from experiments import finetune

    asked = make_request(
        tmp_path_factory.mktemp("mixed") / "run",
        five,
        None,
        model__weights="none",
        model__contrast="equalize",
        augment__preset="xray",
        augment__elastic=0.0,
        augment__mixup=0.2,
        augment__cutmix=1.0,
    )
    finetune.run(asked)
    return asked


def test_a_run_says_once_what_it_does_and_what_to_mind(mixed):
    said = [line for line in mixed.console.lines if line.startswith("augmentation: ")]
    assert len(said) == 4
    assert "Transforms (preset xray, but for elastic): shift 0.05, rotate 10, " in said[0]
    assert "elastic 0" not in said[0]
    assert said[1].endswith("mixup (alpha 0.2) or cutmix (alpha 1).")
    assert said[2].endswith("Contrast of every image, also of those to predict: equalize.")
    changed = "This is said of the preset as it is; here it was changed to elastic 0."
    assert said[3] == f"augmentation: Labels: {PRESETS['xray'].note} {changed}"


def lines_of(tmp_path, five, **settings):
    from experiments.augmentation import augmentation_lines

    return augmentation_lines(request(tmp_path, five, **settings).config)


def test_a_preset_does_not_speak_for_what_was_changed(five, tmp_path):
    flips = {"augment__preset": "xray", "augment__flip_horizontal": 0.5, "augment__rotate": 10.0}
    transforms, labels = lines_of(tmp_path, five, **flips)
    assert transforms.startswith("Transforms (preset xray, but for flip_horizontal): flip_hori")
    assert labels.endswith("here it was changed to flip_horizontal 0.5.")
    assert lines_of(tmp_path, five, augment__preset="xray")[1:] == [
        f"Labels: {PRESETS['xray'].note}"
    ]


def test_flips_without_a_preset_are_told_of(five, tmp_path):
    _, labels = lines_of(tmp_path, five, augment__flip_horizontal=0.5)
    assert "left and right are swapped" in labels and "augment.flip_horizontal=0." in labels
    assert len(lines_of(tmp_path, five, augment__flip_vertical=0.5)) == 1


def test_what_a_preset_overwrites_of_a_study_is_told(five, tmp_path, capfd):
    from experiments.augmentation import resolve_augmentation

    config = request(tmp_path, five).config
    study = {**config["augment"], "preset": "mri", "flip_vertical": 0.3, "rotate": 7.0,
             "noise": 0.03, "shift": 0.1, "hue": 0.2}  # fmt: skip
    capfd.readouterr()
    found = resolve_augmentation({**config, "augment": study}, {"augment.rotate"})["augment"]
    assert found["flip_vertical"] == 0.0 and found["rotate"] == 7.0
    # Neither what was given, nor what the preset has too, nor what is as in configs/default.py.
    said = capfd.readouterr().out.splitlines()
    told = {line.split("=")[0]: line for line in said if "flip_horiz" not in line}
    names = ("augment.flip_vertical", "augment.hue")
    assert {f"note: {name}" for name in names} <= told.keys()
    for name in ("rotate", "noise", "shift", "preset"):
        assert f"note: augment.{name}" not in told
    assert told["note: augment.hue"].endswith(
        "of the study's file is not used: augment.preset=mri sets it to 0.0; set it on the command "
        "line to keep it"
    )


def test_a_run_keeps_the_contrast_that_its_network_reads(mixed, five, tmp_path):
    from experiments import trained
    from medtl_jax.report.predict import predict_scores
    from medtl_jax.training.devices import data_mesh
    from medtl_jax.training.inference import make_predict

    folder = mixed.folder
    card = json.loads((folder / runs.ENVIRONMENT).read_text())["weights"]["input"]
    assert card["contrast"] == "equalize"
    fitted = trained.open_run(folder).fitted
    assert fitted.spec.input.contrast == "equalize"
    predict = make_predict(fitted.network, fitted.spec, data_mesh(1), 16)
    with np.load(five) as arrays:
        images = jnp.asarray(arrays["test_images"][..., None])
    found = predict_scores(predict, fitted.variables, images, task=fitted.task)
    np.testing.assert_allclose(found, scores(folder), atol=1e-5)
    # A run that begins with these weights says that it reads other images.
    other = make_request(tmp_path / "other", five, folder, model__keep_head=True)
    from experiments.prepared import prepare

    prepare(other)
    assert any(
        line.startswith("note: the weights were trained on images of model.contrast=equalize")
        for line in other.console.lines
    )


def test_what_is_off_leaves_a_run_as_it_was(five, tmp_path):
    """An alpha, a magnitude or a preset that do nothing change no bit of the weights."""
    usual = {"model__weights": "none", "augment__shift": 0.1, "train__epochs": 1}
    plain = run(tmp_path / "plain", five, None, **usual)
    other = run(
        tmp_path / "other", five, None, augment__randaugment=1, augment__cutmix=0.0, **usual
    )
    for name, value in tensors(plain).items():
        np.testing.assert_array_equal(value, tensors(other)[name])


def test_the_sheet_shows_what_the_step_would_see(mixed, five):
    from experiments.augmentation import draw_sheet
    from experiments.prepared import prepare
    from medtl_jax.training.step import train_step

    config = mixed.config
    ready = prepare(dataclasses.replace(mixed, folder=mixed.folder.parent / "again"))
    train, rows = ready.dataset.splits["train"], [0, 32, 63, 95]
    figure = draw_sheet(config, train)
    assert len(figure.axes) == 4 * 7 and "mixed" in figure.get_label()
    drawn = np.stack([np.asarray(axes.images[0].get_array()) for axes in figure.axes])
    assert len({image.tobytes() for image in drawn}) == 28
    drawn = drawn.reshape(4, 7, 28, 28)
    np.testing.assert_array_equal(drawn[:, 0], train.images[rows][..., 0])

    # What the loss of a step is given is what the network has been given.
    (term,), fed = ready.parts.terms, []

    def watched(out, batch, params, anchor):
        jax.debug.callback(lambda image: fed.append(np.asarray(image)), batch["image"])
        return term.term(out, batch, params, anchor)

    parts = dataclasses.replace(ready.parts, terms=(dataclasses.replace(term, term=watched),))
    batch = {"image": train.images[rows], "target": np.asarray(train.target[rows])}
    program = jax.jit(functools.partial(train_step, parts=parts))
    key, spec = jax.random.key(config["seed"]), parts.spec.input
    for step in (0, 4):
        fed.clear()
        state = ready.state.replace(step=jnp.int32(step))
        jax.block_until_ready(program(state, batch, key))
        jax.effects_barrier()
        shown = fed[0] * np.array(spec.std) + np.array(spec.mean)
        np.testing.assert_allclose(drawn[:, 1 + step], shown[..., 0].clip(0, 255), atol=0.51)


def test_kept_features_are_neither_augmented_nor_mixed_and_a_run_says_so(five, mixed, tmp_path):
    from experiments.augmentation import augmentation_lines, mixing, say_augmentation

    asked = make_request(
        tmp_path / "head", five, mixed.folder, transfer__strategy="head",
        augment__preset="xray", augment__mixup=0.2,
    )  # fmt: skip
    assert augmentation_lines(asked.config) == [] and mixing(asked.config) is None
    say_augmentation(asked.config, asked.console)
    assert asked.console.lines == [
        "note: cached features are not augmented; set transfer.views for that",
        "note: augment.mixup has no effect: cached features are not mixed",
    ]
    views = make_request(
        tmp_path / "views", five, mixed.folder, transfer__strategy="head", transfer__views=2,
        augment__preset="xray", augment__mixup=0.2,
    )  # fmt: skip
    assert [line.split(":")[0].split(" ")[0] for line in augmentation_lines(views.config)] == [
        "Transforms",
        "Labels",
    ]
