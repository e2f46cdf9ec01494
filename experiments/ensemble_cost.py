"""What an image costs each network of an ensemble: its parameters, and the time on this device."""

import json
import math
import pathlib
import statistics
import time
from collections.abc import Sequence

import jax

from experiments.ensemble_candidates import open_member
from experiments.ensemble_cells import MemberCell, by_network
from experiments.ladder_requests import Memos, cell_request, keep_one
from experiments.prepared import make_mesh, read_training_data
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.catalog import Array
from medtl_jax.data.streams import select
from medtl_jax.report.ensemble import NetworkCost
from medtl_jax.training.inference import make_predict

# What was measured is kept: the same command writes the same table again.
MEASURED = "inference.json"
_REPEATS = 5


def network_costs(
    cells: Sequence[MemberCell], request: Request, memos: Memos
) -> dict[str, NetworkCost]:
    """The cost of each network, by its label; of what was measured here before as it was then.

    The time is the median over five batches of `eval.batch_size` images after one to warm up, from
    the host's memory to the logits.
    """
    path = request.folder / MEASURED
    known = runs.read_json(path) if path.is_file() else {}
    found = {}
    for label, group in by_network(cells).items():
        config = group[0].resolved
        key = json.dumps(
            [config["model"], config["task"], config["eval"]["batch_size"], _device(config)],
            sort_keys=True,
        )
        entry = known.get(key)
        if not _is_cost(entry):
            keep_one(memos, group[0])
            images = read_training_data(cell_request(group[0], request, memos)).splits["val"].images
            entry = _measure(group[0], group[0].folder(request.folder), images)
            known[key] = entry
            runs.write_json(path, known)
        found[label] = NetworkCost(int(entry["parameters"]), float(entry["milliseconds"]))
    return found


def _device(config: dict) -> list:
    return [jax.devices()[0].device_kind, len(jax.devices()), config["train"]["devices"]]


def _is_cost(entry: object) -> bool:
    """Whether a part of the file, which may be of anybody, is what `_measure` makes."""
    return (
        isinstance(entry, dict)
        and type(entry.get("parameters")) is int
        and 0 <= entry["parameters"] < 2**53
        and type(entry.get("milliseconds")) is float
        and 0 <= entry["milliseconds"] < math.inf
    )


def _measure(cell: MemberCell, folder: pathlib.Path, images: Array) -> dict[str, float]:
    fitted, size = open_member(folder).fitted, cell.resolved["eval"]["batch_size"]
    predict = make_predict(fitted.network, fitted.spec, make_mesh(cell.resolved), size)
    # A batch that is not full is padded, and takes as long.
    batch, seconds = select(images, slice(0, size)), []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        predict(fitted.variables, batch)
        seconds.append(time.perf_counter() - started)
    leaves = jax.tree.leaves(fitted.variables["params"])
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "milliseconds": round(1000 * statistics.median(seconds[1:]) / size, 4),
    }
