"""The benchmark times what it says, refuses what it cannot time, and keeps what it has."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import (
    benchmark,
    benchmark_augment,
    benchmark_cache,
    benchmark_ensemble,
    benchmark_input,
    benchmark_timing,
)
from medtl_jax.commands import run_tool
from medtl_jax.errors import UserError

SMALL = ["--models", "lenet5", "--size", "28", "--batch", "4", "--rounds", "1", "--seconds", "0.01"]
NETWORKS = [*SMALL, "--parts", "models"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """The product of matrices, whose size is that of real machines, takes no time."""
    product = benchmark._product
    monkeypatch.setattr(benchmark, "_product", lambda side, *given: product(64, *given))


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Title -> rows by column, of the Markdown that the benchmark writes."""
    found = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.strip().splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
        found[title] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return found


def fake_torch(folder, answers: str) -> str:
    """An interpreter that notes what it is asked in `folder`, and answers by a line of shell."""
    path = folder / "torch"
    path.write_text(
        f"#!/bin/sh\necho started >> {folder}/asked\necho 2.0\n"
        f'while read name mode count; do echo "$name $mode $count" >> {folder}/asked; '
        f"{answers}; done\n"
    )
    path.chmod(0o755)
    return str(path)


def test_a_row_for_each_network_and_mode(capsys):
    benchmark.main(NETWORKS)
    product, *rows = tables(capsys.readouterr().out)["Networks"]
    assert product["of peak"] == "100%"
    assert [(row["network"], row["mode"]) for row in rows] == [
        ("lenet5", "forward"),
        ("lenet5", "train"),
    ]
    for row in rows:
        rate, seconds = float(row["images/s"]), float(row["ms a step"]) / 1000
        assert rate == pytest.approx(4 / seconds, rel=0.02)
        speed = float(row["GFLOP"]) / seconds
        assert float(row["GFLOP/s"]) == pytest.approx(speed, rel=0.03, abs=0.05)
        assert float(row["planned MB"]) > 0
    # LeNet-5 of colour images by hand, see test_benchmark_prefix; biases and pooling count too.
    layers = 28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 1000
    assert float(rows[0]["GFLOP"]) == pytest.approx(4 * 2 * layers / 1e9, rel=0.05)
    # Two products of the same size for the gradients of each, but none of the image's.
    most = 3 - 28 * 28 * 6 * 75 / layers
    assert float(rows[1]["GFLOP"]) / float(rows[0]["GFLOP"]) == pytest.approx(most, rel=0.1)


def test_the_other_side_is_asked_in_turns(tmp_path, capsys):
    torch = fake_torch(tmp_path, "echo 0.5")
    benchmark.main([*NETWORKS, "--rounds", "3", "--modes", "forward", "--torch", torch])
    # Once to build it and once to see how long it takes.
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["started", *["lenet5 forward 1"] * 5]
    output = capsys.readouterr().out
    assert "torch 2.0" in output
    row = tables(output)["Networks"][1]
    assert row["torch images/s"] == "8.0"
    ratio = float(row["ratio"])
    assert ratio == pytest.approx(float(row["images/s"]) / 8.0, abs=0.01 * ratio + 0.01)


@pytest.mark.parametrize(
    ("answers", "note", "starts"),
    [
        ("echo OutOfMemoryError: too large", "torch: OutOfMemoryError: too large", 1),
        ("exit", "torch's side of the benchmark ended; its own message stands above", 2),
    ],
)
def test_where_the_other_side_fails_ours_is_there(tmp_path, capsys, answers, note, starts):
    benchmark.main([*NETWORKS, "--torch", fake_torch(tmp_path, answers)])
    rows = tables(capsys.readouterr().out)["Networks"][1:]
    assert [row["note"] for row in rows] == [note] * 2
    assert all(float(row["images/s"]) > 0 for row in rows)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked.count("started") == starts
    assert asked[-1] == "lenet5 train 1"


def test_a_network_that_fails_has_a_note_and_the_others_stay(tmp_path, capsys, monkeypatch):
    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    def wrong(*_):
        raise ValueError("no | such thing\nat all")

    modes = {"large": too_large, "wrong": wrong, "forward": benchmark.forward_pass}
    monkeypatch.setattr(benchmark, "MODES", modes)
    out = tmp_path / "table.md"
    arguments = [*NETWORKS, "--modes", "large,wrong,forward", "--output", str(out)]
    assert run_tool(benchmark.main, arguments) == 0
    printed = capsys.readouterr()
    assert out.read_text() == printed.out
    large, odd, forward = tables(printed.out)["Networks"][1:]
    assert large["note"] == "out of memory"
    assert odd["note"] == "failed: ValueError: no / such thing" and "Traceback" in printed.err
    assert float(forward["images/s"]) > 0 and not forward["note"]


def test_a_part_that_breaks_off_keeps_its_rows_and_the_parts_after_it(capsys, monkeypatch):
    def rows():
        yield {"what": "first"}
        raise OSError("no space left")

    section = benchmark_timing.Section("Broken", ("what", "note"), rows())
    parts = {"broken": lambda *_: section, "models": benchmark.models_section}
    monkeypatch.setattr(benchmark, "PARTS", parts)
    benchmark.main([*SMALL, "--parts", "broken,models", "--modes", "forward"])
    found = tables(capsys.readouterr().out)
    assert [row["what"] for row in found["Broken"]] == ["first", "the rest"]
    assert found["Broken"][1]["note"] == "failed: OSError: no space left"
    assert len(found["Networks"]) == 2


def test_every_part_has_its_table(tmp_path, capsys, optax_promotion):
    torch = fake_torch(tmp_path, "echo 0.5")
    few = ["--members", "2", "--programs", "turns,vmap", "--presets", "xray", "--torch", torch]
    benchmark.main([*SMALL, *few, "--modes", "forward"])
    found = list(tables(capsys.readouterr().out).values())
    networks, read, augmented, ensembles, cached = found
    assert [row["note"] for table in found for row in table if row.get("note")] == []
    assert len(networks) == 2
    sources = [row["images from"].split()[0] for row in read]
    assert sources == ["npz", "PNG", "PNG", "JPEG", "JPEG", "the"]
    assert all(float(row["images/s"]) > 0 for row in read)
    pairs = [(row["augmentation"], row["channels"]) for row in augmented]
    assert pairs == [("usual", "3"), ("xray", "1")]
    programs = ["alone", "turns", "vmap"]
    assert [row["program"] for row in ensembles] == programs * 2
    # On a CPU, networks take turns and heads are one product.
    assert [row["auto"] for row in ensembles] == ["", "yes", "", "", "", "yes"]
    assert [row["members"] for row in ensembles] == ["1", "2", "2"] * 2
    assert all(float(row["to one alone"]) > 0 for row in ensembles if row["members"] == "2")
    assert [row["the features"] for row in cached] == ["computed every step", "kept"]
    assert [row["torch images/s"] for row in cached] == ["8.0", ""]
    assert "lenet5 head 1" in (tmp_path / "asked").read_text()


def test_cached_features_are_faster_by_what_the_steps_take(monkeypatch):
    class Steps:
        def __init__(self, variant, *_, **given):
            assert given == {"image_size": 28, "batch": 4, "frozen_until": "head"}
            self.seconds = {"frozen": 0.3, "head": 0.05}[variant]

        def time(self, count):
            return count * self.seconds

        def measured(self, seconds):
            return types.SimpleNamespace(planned=3_000_000)

    monkeypatch.setattr(benchmark_cache, "Steps", Steps)
    options = types.SimpleNamespace(
        models=["lenet5"], size=28, batch=4, rounds=3, seconds=0.01, dtype="float32"
    )
    rows = list(benchmark_cache.cache_section(options, None).rows)
    assert [row["faster"] for row in rows] == ["1.0x", "6.0x"]
    assert [row["images/s"] for row in rows] == ["13.3", "80.0"]
    assert [row["planned MB"] for row in rows] == ["3.0", "3.0"]


def test_members_are_compared_with_one_alone(monkeypatch):
    steps_of = []

    class Members:
        def __init__(self, kind, count, mode, steps):
            self.count, self.steps = count, steps
            self.program = types.SimpleNamespace(cost=lambda: {"step_bytes": 2_500_000})
            steps_of.append((mode, count, steps))

        def seconds(self):
            return 0.01 if self.count == 1 else 0.006 * self.count

    phase = types.SimpleNamespace(parts=types.SimpleNamespace(start=""))
    kind = types.SimpleNamespace(training=types.SimpleNamespace(phases=[phase]))
    monkeypatch.setattr(benchmark_ensemble, "_Members", Members)
    options = types.SimpleNamespace(members=[2, 8], programs=["turns", "scan"], rounds=3, seconds=1)
    rows = list(benchmark_ensemble._rows_of("one", lambda: kind, options))
    assert [row.get("to one alone") for row in rows] == [None, *["0.60"] * 4]
    assert [row["ms a step of all"] for row in rows] == ["10", "12", "12", "48", "48"]
    assert {row["ms a step of one member"] for row in rows[1:]} == {"6"}
    assert {row["planned MB a member"] for row in rows} == {"2.5"}
    # 25 steps of 10 ms, so that eight members take two seconds in turn.
    assert [steps for *_, steps in steps_of] == [4, *[25] * 5]


def test_members_that_do_not_fit_leave_the_others(monkeypatch):
    one = types.SimpleNamespace(
        seconds=lambda: 0.01, steps=5, program=types.SimpleNamespace(cost=dict)
    )

    def members(kind, count, *_):
        if count == 8:
            raise UserError("8 members do not fit into memory at once")
        return one

    phase = types.SimpleNamespace(parts=types.SimpleNamespace(start=""))
    kind = types.SimpleNamespace(training=types.SimpleNamespace(phases=[phase]))
    monkeypatch.setattr(benchmark_ensemble, "_Members", members)
    options = types.SimpleNamespace(members=[8, 2], programs=["vmap"], rounds=1, seconds=0.1)
    rows = list(benchmark_ensemble._rows_of("one", lambda: kind, options))
    assert rows[1]["note"] == "8 members do not fit into memory at once"
    assert rows[2]["to one alone"] == "0.50" and "note" not in rows[2]


def test_timers_take_turns():
    asked = []

    def timer(name, seconds):
        def run(count):
            asked.append((name, count))
            return count * seconds

        return run

    found = benchmark_timing.alternate([timer("a", 0.1), timer("b", 0.4)], 2, 1.0)
    assert found == pytest.approx([0.1, 0.4])
    # A short one is looked at three times before the rounds, a long one once.
    assert asked == [*[("a", 1)] * 3, ("b", 1), *[("a", 10), ("b", 2)] * 2]


def test_arithmetic_and_memory_of_a_compiled_step():
    def step(carry, other):
        return carry @ other, None

    arrays = [np.ones((32, 32), np.float32)] * 2
    timed = benchmark_timing.compile_step(step, *map(jax.numpy.asarray, arrays))
    assert timed.flops == 2 * 32**3
    # Two matrices and, at most, the result, which may take the place of the first.
    assert 2 * 4096 <= timed.planned <= 3 * 4096
    assert timed.time(3) > 0


def test_the_peak_of_a_device_that_a_row_did_not_raise(monkeypatch):
    peaks = iter([None, 5_000_000, 5_000_000, 5_000_000])
    monkeypatch.setattr(benchmark_timing, "_device_peak", lambda: next(peaks))
    rows = [benchmark_timing.measured_row({"n": str(n)}, dict) for n in range(2)]
    peak = benchmark_timing.DEVICE_PEAK
    assert rows == [{"n": "0", peak: "5"}, {"n": "1", peak: "at most 5"}]


def test_the_files_hold_the_images_of_the_set(tmp_path):
    benchmark_input._write(tmp_path, 3)
    with np.load(tmp_path / "set.npz") as archive:
        images, labels = archive["train_images"], archive["train_labels"]
    assert images.shape == (3, benchmark_input.STORED, benchmark_input.STORED, 3)
    assert images.dtype == np.uint8 and labels.tolist() == [0, 1, 0]
    for number, image in enumerate(images):
        read = np.asarray(Image.open(tmp_path / f"{number:04d}.png"))
        np.testing.assert_array_equal(read, image)
        lossy = np.asarray(Image.open(tmp_path / f"{number:04d}.jpg"), np.float32)
        assert np.abs(lossy - image).mean() < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds=0 must be at least 1"),
        (["--batch", "0"], "--batch=0 must be at least 1"),
        (["--batch", "6"], "--batch=6 must be a positive multiple of the 4 device(s)"),
        (["--seconds", "0"], "--seconds=0.0 must be more than 0"),
        (["--size", "8"], "--size=8 is too small for lenet5"),
        (["--size", "0", "--parts", "input"], "--size=0 must be at least 1"),
        (["--member-size", "8"], "--member-size=8 is too small for lenet5"),
        (["--models", "resnet"], "model.name='resnet' is not a model"),
        (["--member-models", "resnet"], "model.name='resnet' is not a model"),
        (["--modes", "forward,both"], "'both' is not known"),
        (["--parts", "models,all"], "'all' is not known; choose from models, input, augment"),
        (["--presets", "photos"], "'photos' is not known; choose from xray, ct"),
        (["--programs", "loop"], "'loop' is not known; choose from turns, vmap, scan, unroll"),
        (["--members", "2,two"], "--members=2,two: want numbers from 1 on"),
        (["--members", "0"], "--members=0: want numbers from 1 on"),
        (["--output", "/no/such/folder/table.md"], "name a file in a folder that exists"),
        (["--torch", "/no/such/python"], "No such file or directory"),
        (["--torch", "/bin/true"], "torch's side of the benchmark ended"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run_tool(benchmark.main, [*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_only_the_head_of_a_frozen_network_learns():
    torch = pytest.importorskip("torch")
    from experiments import benchmark_torch

    layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)]
    network = torch.nn.Sequential(*layers)
    benchmark_torch.freeze(network)
    learning = [name for name, value in network.named_parameters() if value.requires_grad]
    assert learning == ["2.weight", "2.bias"] and not network.training
    with pytest.raises(ValueError, match="no linear layer"):
        benchmark_torch.freeze(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)))


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
