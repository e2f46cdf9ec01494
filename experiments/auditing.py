"""The audit of the data before a training: made once for a set, kept, and refused above a limit."""

import hashlib
import pathlib
import time
from collections.abc import Mapping

import pooch
from matplotlib.figure import Figure

from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.audit import VERSION, audit_dataset, highest_share
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.errors import UserError
from medtl_jax.files import user_path
from medtl_jax.report.audit import MOST_DRAWN, audit_figure
from medtl_jax.report.predict import Predictions

OFF = "off"
# An audit that took longer is kept on disk for other processes.
_WORTH_KEEPING = 2.0
_MOST_KEPT = 16

_of_this_process: dict[str, dict] = {}


def check_audit(config: dict, console: Console, dataset: Dataset) -> None:
    """Says what the audit of the data found. UserError where copies are above the limit."""
    if config["data"]["audit"] == OFF:
        console.note("audit: off (data.audit)")
        return
    audit = look(config, console, dataset)
    findings = audit["findings"]
    console.note(f"audit: {'; '.join(findings) if findings else 'nothing found'}")
    worst, share = highest_share(audit)
    limit = config["data"]["audit_limit"]
    if share > limit:
        raise UserError(
            f"{dataset.spec.name}: {share:.2%} of the images of {worst} have a copy in an earlier "
            f"split (data.audit_limit={limit:g}): python -m medtl_jax.data audit lists them; "
            "remove them, raise data.audit_limit, or set data.audit=off"
        )


def audit_card(config: dict, console: Console, dataset: Dataset) -> dict | str:
    """What `environment.json` says of it: the content of `data.audit.audit_dataset`, or "off"."""
    return OFF if config["data"]["audit"] == OFF else look(config, console, dataset)


def draw_copies(
    audit: dict | str | None, train: Split | None, predictions: Mapping[str, Predictions]
) -> dict[str, Figure]:
    """The figure `audit`: a few of the pairs across splits; nothing where there are none."""
    if not isinstance(audit, dict) or train is None:
        return {}
    sets = {**predictions, "train": train}
    rows = {name: {id: row for row, id in enumerate(part.ids)} for name, part in sets.items()}
    across = [pair for pair in audit["pairs"] if pair["first"][0] != pair["second"][0]]
    shown = [
        (*(sets[split].images[rows[split][id]] for split, id in sides), pair["second"][1])
        for pair in across
        for sides in [(pair["first"], pair["second"])]
        if all(split in sets and id in rows[split] for split, id in sides)
    ]
    return {"audit": audit_figure(shown[:MOST_DRAWN])} if shown else {}


def look(config: dict, console: Console, dataset: Dataset) -> dict:
    """The audit of these very images, labels and splits, made where none is kept."""
    key = hashlib.sha256(f"{VERSION} {dataset.checksum()}".encode()).hexdigest()
    if key not in _of_this_process:
        while len(_of_this_process) >= _MOST_KEPT:
            del _of_this_process[next(iter(_of_this_process))]
        _of_this_process[key] = _kept(config, key) or _made(config, console, dataset, key)
    return _of_this_process[key]


def _path(config: dict, key: str) -> pathlib.Path:
    text = config["transfer"]["cache_dir"]
    folder = (
        user_path(text, "transfer.cache_dir")
        if text
        else pathlib.Path(pooch.os_cache("medtl_jax"), "audits")
    )
    return folder / f"audit-{key}.json"


def _kept(config: dict, key: str) -> dict | None:
    """What an earlier process kept; None where that is nothing, or damaged."""
    try:
        kept = runs.read_json(_path(config, key))
        highest_share(kept)
        whole = kept["version"] == VERSION and {"findings", "notes", "pairs"} <= kept.keys()
    except (UserError, LookupError, TypeError, AttributeError):
        return None
    return kept if whole else None


def _made(config: dict, console: Console, dataset: Dataset, key: str) -> dict:
    started = time.monotonic()
    with console.progress("audit") as advance:
        audit = audit_dataset(dataset, advance)
    if time.monotonic() - started > _WORTH_KEEPING:
        # Without a place to keep it, it is made again the next time.
        try:
            runs.write_json(_path(config, key), audit)
        except UserError as error:
            console.note(f"note: the audit is not kept: {error}")
    return audit
