"""Which epoch is chosen, and validation splits that no epoch could be chosen on."""

import numpy as np
import pytest

from medtl_jax.data.streams import Streamed
from medtl_jax.domain.selection import VALIDATORS
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task
from medtl_jax.training.selection import (
    best_epoch,
    best_so_far,
    check_validation,
    task_validator,
)

ABC = ("a", "b", "c")
CLASSIFY = Task("classify", ABC)
ORDINAL = Task("ordinal", ABC)
FINDINGS = Task("multilabel", ("x", "y"))
MASKS = Task("segment", ABC)
ONE = Task("regress", ("age",), mean=(0.0,), std=(1.0,))
TWO = Task("regress", ("age", "area"), mean=(0.0, 0.0), std=(1.0, 1.0))
NAN = np.nan


def log(name, values):
    return [{"epoch": e, f"val_{name}": value} for e, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("select", "values", "expected"),
    [
        ("loss", [3.0, 1.0, 2.0], 2),
        ("loss", [1.0, 0.5, 0.5], 2),  # the earliest of equals
        ("accuracy", [0.5, 0.9, 0.9, 0.1], 2),
        ("auc", [None, 0.4, None, 0.6, 0.5], 4),
        ("auc", [None, 0.5, 0.5], 2),
        ("loss", [0.0, -0.0], 1),
    ],
)
def test_best_epoch_by_hand(select, values, expected):
    validator = task_validator(select, CLASSIFY)
    assert best_epoch(log(select, values), validator) == expected
    assert best_so_far(log(select, values), validator) == expected


def test_a_value_that_was_never_defined_is_one_line_at_the_end_only():
    validator = task_validator("mcc", CLASSIFY)
    assert best_so_far([], validator) is None
    assert best_so_far(log("mcc", [None, None]), validator) is None
    message = r"^train.select=mcc was undefined .* in every epoch; choose train.select=loss and"
    with pytest.raises(UserError, match=message):
        best_epoch(log("mcc", [None, None]), validator)


def test_without_target_labels_it_is_the_validator_that_chooses():
    records = [
        {"epoch": 1, "val_accuracy": 0.9, "target_infomax": None, "oracle_accuracy": 0.1},
        {"epoch": 2, "val_accuracy": 0.8, "target_infomax": 0.5, "oracle_accuracy": 0.1},
        {"epoch": 3, "val_accuracy": 0.7, "target_infomax": 0.2, "oracle_accuracy": 0.9},
    ]
    infomax = VALIDATORS["infomax"]
    assert best_so_far(records[:1], infomax) is None
    assert best_so_far(records, infomax) == best_epoch(records, infomax) == 2
    assert best_epoch(records, task_validator("accuracy", CLASSIFY)) == 1
    message = "^the validator infomax has no finite value in any of 1 records: choose another"
    with pytest.raises(UserError, match=message):
        best_epoch(records[:1], infomax)


def column(*values):
    return np.array(values, np.float32)[:, None]


MASK = np.zeros((70, 2, 2), np.uint8)
MASK[69, 0, 0] = 1
REFUSED = [
    ("auc", CLASSIFY, [0, 1, 1], "has no image of c"),
    ("pr_auc", CLASSIFY, [0, 2], "has no image of b"),
    ("balanced_accuracy", ORDINAL, [1, 2], "has no image of a"),
    ("f1", CLASSIFY, [1, 2], "has no image of a"),
    ("mcc", CLASSIFY, [1, 1], "has images of one class only"),
    ("quadratic_kappa", ORDINAL, [1, 1], "has images of one class only"),
    ("dice", MASKS, MASK, "has no pixel of c"),
    ("auc", FINDINGS, [[1, 0], [1, -1], [-1, 0]], "has no finding that some images have and"),
    ("f1", FINDINGS, [[0, 0], [-1, 0]], "has no image with a finding"),
    ("loss", FINDINGS, [[-1, -1]], "has no known label"),
    ("r2", ONE, column(3, 3, NAN), "has one value of age only"),
    ("pearson", TWO, [[1, 2], [2, 2]], "has one value of area only"),
    ("r2", TWO, [[1, NAN], [2, NAN]], "has no known value of area"),
    ("loss", ONE, column(NAN, NAN), "has no known value"),
]
TAKEN = [
    ("auc", CLASSIFY, [0, 1, 2]),
    ("mcc", CLASSIFY, [0, 1, 1]),
    ("accuracy", CLASSIFY, [1, 1]),
    ("loss", ORDINAL, [1, 1]),
    ("mae", ORDINAL, [1, 1]),
    # The other finding defines the mean.
    ("auc", FINDINGS, [[1, 0], [1, 1], [-1, 0]]),
    ("f1", FINDINGS, [[1, 0]]),
    ("mae", ONE, column(3, NAN)),
    ("r2", ONE, column(3, 4)),
    ("loss", TWO, [[1, NAN], [2, NAN]]),
]


@pytest.mark.parametrize(("select", "task", "target", "reason"), REFUSED)
def test_what_no_epoch_could_define_is_refused(select, task, target, reason):
    with pytest.raises(UserError) as caught:
        check_validation(select, task, np.asarray(target))
    message = str(caught.value)
    assert message.startswith(f"train.select={select} is undefined: the validation split {reason}")
    assert message.endswith("choose train.select=loss") == (select != "loss")


@pytest.mark.parametrize(("select", "task", "target"), TAKEN)
def test_what_some_epoch_defines_is_taken(select, task, target):
    check_validation(select, task, np.asarray(target))


def test_streamed_masks_are_read_in_parts():
    parts = []

    class Parts(Streamed):
        def __init__(self):
            pass

        def __len__(self):
            return len(MASK)

        def __getitem__(self, rows):
            parts.append(rows)
            return MASK[rows]

    background = Task("segment", ("background", "lesion"))
    check_validation("dice", background, Parts())
    assert len(parts) == 2
