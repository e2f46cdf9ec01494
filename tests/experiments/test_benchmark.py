"""The benchmark times what it says, and refuses what it cannot time."""

import pytest

from experiments import benchmark, benchmark_augment
from medtl_jax.errors import UserError

SMALL = ["--models", "lenet5", "--size", "28", "--batch", "4", "--rounds", "1", "--seconds", "0.01"]


def test_a_row_for_each_network_and_mode(capsys):
    benchmark.main(SMALL)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == ["| lenet5"] * 2
    assert [row[1] for row in rows] == ["forward", "train"]
    assert all(float(row[2]) > 0 for row in rows)


def test_the_other_side_is_asked_in_turns(tmp_path, capsys, monkeypatch):
    torch = tmp_path / "torch"
    torch.write_text(
        "#!/bin/sh\necho 2.0\n"
        f'while read name mode count; do echo "$name $mode" >> {tmp_path}/asked; echo 0.5; done\n'
    )
    torch.chmod(0o755)
    benchmark.main([*SMALL, "--rounds", "3", "--modes", "forward", "--torch", str(torch)])
    assert (tmp_path / "asked").read_text().splitlines() == ["lenet5 forward"] * 3
    output = capsys.readouterr().out
    assert "torch 2.0" in output
    ours, theirs, ratio = (float(part) for part in output.splitlines()[-1].split("|")[3:6])
    assert ratio == pytest.approx(ours / theirs, abs=0.01 * ratio + 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
        (["--batch", "0"], "--batch=0 must be at least 1"),
        (["--size", "8"], "--size=8 is too small for lenet5"),
        (["--models", "resnet"], "model.name='resnet' is not a model"),
        (["--modes", "forward,both"], "'both' is not known"),
        (["--torch", "/no/such/python"], "No such file or directory"),
        (["--torch", "/bin/true"], "torch's side of the benchmark ended"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        benchmark.main([*SMALL, *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_for_each_preset(capsys):
    small = ["--model", "lenet5", "--size", "28", "--batch", "2", "--rounds", "3", "--steps", "1"]
    benchmark_augment.main([*small, "--presets", "xray,histology"])
    head, line, *rows = (row.split("|")[1:-1] for row in capsys.readouterr().out.splitlines()[2:])
    rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in rows] == [["xray", "1"], ["histology", "3"]]
    assert {len(head), len(line), *map(len, rows)} == {7}
    assert head[4:6] == [" added, median of the rounds' ratios ", " least to most "]
    for row in rows:
        assert all(float(row[place]) > 0 for place in (2, 3, 6))
        least, most = (int(cell.strip(" %")) for cell in row[5].split("to"))
        assert least <= int(row[4].strip(" %")) <= most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--presets", "photos"], "'photos' is not known; choose from xray, ct"),
        (["--steps", "0"], "--steps=0 must be at least 1"),
        (["--size", "8"], "--size=8 is too small for efficientnet_lite0"),
    ],
)
def test_mistakes_about_presets_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark_augment.main(arguments)
