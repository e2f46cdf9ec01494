"""The axes of an ablation as they are written, the rows they make, and their names."""

import json

import pytest

from configs import default
from experiments import ablation
from experiments.ablation_axes import parse_axes, row_name, rows_of, settings_of
from experiments.ablation_cells import make_cells
from medtl_jax.augment.presets import find_preset
from medtl_jax.errors import UserError

AXES = {
    "optim.high.lr": [1, 0.002],
    "look": {"plain": {}, "xray": {"augment.preset": "xray", "model.contrast": "clahe"}},
    "data.train_fraction": [0.5, 1.0],
}


def test_a_grid_has_all_combinations_and_begins_with_the_reference():
    axes = parse_axes(json.dumps(AXES))
    rows = rows_of(axes, "grid")
    assert len(rows) == 8 and len({row_name(row) for row in rows}) == 8
    assert row_name(rows[0]) == "lr=1, look=plain, train_fraction=0.5"
    assert settings_of(axes, rows[0]) == {"optim.high.lr": 1.0, "data.train_fraction": 0.5}
    assert type(settings_of(axes, rows[0])["optim.high.lr"]) is float
    assert settings_of(axes, rows[-1]) == {
        "optim.high.lr": 0.002,
        "augment.preset": "xray",
        "model.contrast": "clahe",
        "data.train_fraction": 1.0,
    }


def test_one_at_a_time_differs_from_the_reference_once():
    rows = rows_of(parse_axes(json.dumps(AXES)), "one")
    changed = [[name for name in row if row[name] != rows[0][name]] for row in rows]
    assert changed == [[], ["optim.high.lr"], ["look"], ["data.train_fraction"]]


def test_keys_are_named_by_as_much_as_tells_them_apart():
    axes = parse_axes('{"optim.low.lr": [0.1, 0.2], "optim.high.lr": [0.1, 0.2]}')
    assert row_name(rows_of(axes, "grid")[0]) == "low.lr=0.1, high.lr=0.1"


def test_a_row_with_a_preset_has_its_strengths_and_its_own_keys(capsys):
    config = default.get_config()
    rows = {"plain": {}, "xray": {"augment.preset": "xray", "augment.shift": 0.01}}
    config.ablation.axes, config.ablation.seeds = json.dumps({"look": rows}), 1
    # What the study sets is the reference's, and the preset's row has the preset's.
    config.augment.blur = 0.3
    plain, xray = make_cells(config.to_dict())
    strengths = find_preset("xray").strengths
    assert plain.config["augment"]["blur"] == 0.3
    found = {name: xray.config["augment"][name] for name in strengths}
    assert found == {**strengths, "shift": 0.01}
    assert xray.config["augment"]["preset"] == "" and capsys.readouterr().out == ""
    assert xray.settings == {"augment.preset": "xray", "augment.shift": 0.01}


def test_rows_need_names_of_their_own_and_may_not_be_too_many():
    odd = {
        "a": {"x": {"augment.noise": 0.1}, "x, b=y": {"augment.noise": 0.2}},
        "b": {"z": {"augment.blur": 0.1}, "y, b=z": {"augment.blur": 0.2}},
    }
    with pytest.raises(UserError, match="two rows would be called 'a=x, b=y, b=z'"):
        rows_of(parse_axes(json.dumps(odd)), "grid")
    values = [i / 100 for i in range(40)]
    wide = {"augment.noise": values, "augment.blur": values}
    with pytest.raises(UserError, match="more than 1000 rows"):
        rows_of(parse_axes(json.dumps(wide)), "grid")
    assert len(rows_of(parse_axes(json.dumps(wide)), "one")) == 79


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (
            {"transfer.alpha": [0.02, 0.5], "transfer.strategy": ["l2sp", "full"]},
            "alpha=0.02, strategy=l2sp, seed 0: ",
        ),
        (
            {"augment.noise": [0.0, 0.1], "look": {"plain": {}, "sharp": {"augment.blur": 0.0}}},
            "the rows 'noise=0.0, look=plain' and 'noise=0.0, look=sharp' come to the same runs",
        ),
    ],
)
def test_rows_that_would_not_be_what_they_say_are_refused(axes, words):
    config = default.get_config()
    config.ablation.axes = json.dumps(axes)
    with pytest.raises(UserError) as raised:
        make_cells(config.to_dict())
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_row_cannot_take_the_studys_preset_back():
    config = default.get_config()
    config.augment.preset = "xray"
    config.ablation.axes = '{"augment.preset": ["", "ct"]}'
    with pytest.raises(UserError, match="and the study 'xray', which no row can take back"):
        ablation.resolve(config.to_dict())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "ablation.axes is no JSON"),
        ("{'a': 1}", "ablation.axes is no JSON"),
        ("[" * 100_000, "ablation.axes is no JSON"),
        ("{}", "name one axis or more"),
        ("[1, 2]", "name one axis or more"),
        ('{"optim.high.lr": 0.1}', "optim.high.lr wants a list of values"),
        ('{"optim.high.lr": [0.1]}', "optim.high.lr has 1 settings; an axis wants two or more"),
        ('{"optim.high.lr": [0.1, 0.1]}', "optim.high.lr: 0.1 is there twice"),
        ('{"optim.high.lr": [1, 1.0]}', "1.0 sets the same as another"),
        ('{"optim.high.lr": [0.1, "fast"]}', "optim.high.lr='fast' must be of the type of"),
        ('{"optim.high.lr": [0.1, true]}', "optim.high.lr=True must be of the type of"),
        ('{"optim.high.rate": [0.1, 0.2]}', "there is no key optim.high.rate"),
        ('{"seed": [0, 1]}', "seed cannot be varied"),
        ('{"ablation.seeds": [1, 2]}', "ablation.seeds cannot be varied"),
        ('{"a": {"x": {"seed": 1}, "y": {}}}', "a: x: seed cannot be varied"),
        ('{"a": {"x": 1, "y": {}}}', "a: x wants settings"),
        ('{"a": {"x": {}, "y": {}}}', "a: y sets the same as another"),
        ('{"a": {"x\\n": {}, "y": {"seed": 1}}}', "is no label of 1 to 40 printable letters"),
        ('{"a": {"x": {}, "x": {}}}', "'x' is there twice"),
        ('{"optim.high.lr": [0.1, NaN]}', "NaN is no finite number"),
        ('{"optim.high.lr": [0.1, 1e400]}', "optim.high.lr=inf must be of the type of 0.002, and"),
        ('{"optim.high.lr": [0.1, 1' + 400 * "0" + "]}", "is no label of 1 to 40"),
        (
            '{"a": {"x": {"optim.high.lr": 1' + 400 * "0" + '}, "y": {}}}',
            "must be of the type of 0.002, and finite",
        ),
        ('{"a\\ud800": {"x": {}, "y": {"augment.noise": 0.1}}}', "is no label of 1 to 40"),
        ('{"a\\nb": {"x": {}, "y": {"augment.noise": 0.1}}}', "is no label of 1 to 40"),
        (
            '{"augment.shift": [0.1, 0.2], "look": {"x": {"augment.shift": 0.0}, "y": {}}}',
            "the axes augment.shift and look both set augment.shift",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(text, words):
    with pytest.raises(UserError) as raised:
        parse_axes(text)
    assert words in str(raised.value) and "\n" not in str(raised.value)
