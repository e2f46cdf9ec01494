"""Tables that no experiment can have given are flagged; tables of real experiments never are."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from medtl_jax.commands import run_tool
from medtl_jax.errors import UserError
from medtl_jax.metrics import __main__ as tool
from medtl_jax.metrics.table_cells import (
    MOST_BYTES,
    MOST_COLUMNS,
    MOST_LETTERS,
    read_cell,
    read_header,
)
from medtl_jax.metrics.table_check import check_table

# Tables 2 and 3 of "Transfer learning techniques for optimising pretrained CNNs in medical
# imaging", RJCSE 4(2), 2023, pp. 73-88: the cells of the six contradictions.
# AlexNet's precision and recall are known here by their harmonic mean alone, 92.44; the test puts
# in pairs that have it.
PAPER = """\
Model,Precision,Recall,F1-score,Dice,IoU,MAE,MSE
CNN,93.22,95.41,96.45,98.65,90.33,,
LeNet,,,,95.12,87.52,,
AlexNet,{precision},{recall},93.41,98.63,89.41,6.35,19.42
"""

# MedMNIST v2, Scientific Data 10:41 (2023), Table 3, mean of at least three runs: AUC / ACC of
# ResNet-18 (28), ResNet-18 (224), ResNet-50 (28), ResNet-50 (224), auto-sklearn, AutoKeras and
# Google AutoML Vision.
METHODS = ("R18-28", "R18-224", "R50-28", "R50-224", "auto-sklearn", "AutoKeras", "Google AutoML")
MEDMNIST = """\
Path 7,180 .983/.907 .989/.909 .990/.911 .989/.892 .934/.716 .959/.834 .944/.728
Chest 22,433 .768/.947 .773/.947 .769/.947 .773/.948 .649/.779 .742/.937 .778/.948
Derma 2,005 .917/.735 .920/.754 .913/.735 .912/.731 .902/.719 .915/.749 .914/.768
OCT 1,000 .943/.743 .958/.763 .952/.762 .958/.776 .887/.601 .955/.763 .963/.771
Pneumonia 624 .944/.854 .956/.864 .948/.854 .962/.884 .942/.855 .947/.878 .991/.946
Retina 400 .717/.524 .710/.493 .726/.528 .716/.511 .690/.515 .719/.503 .750/.531
Breast 156 .901/.863 .891/.833 .857/.812 .866/.842 .836/.803 .871/.831 .919/.861
Blood 3,421 .998/.958 .998/.963 .997/.956 .997/.950 .984/.878 .998/.961 .998/.966
Tissue 47,280 .930/.676 .933/.681 .931/.680 .932/.680 .828/.532 .941/.703 .924/.673
OrganA - .997/.935 .998/.951 .997/.935 .998/.947 .963/.762 .994/.905 .990/.886
OrganC - .992/.900 .994/.920 .992/.905 .993/.911 .976/.829 .990/.879 .988/.877
OrganS - .972/.782 .974/.778 .972/.770 .975/.785 .945/.672 .974/.813 .964/.749
"""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """`check(text, **settings)`: the report on a table; the file is written anew each time."""
    path = tmp_path_factory.mktemp("tables") / "table.csv"

    def call(text, **arguments):
        path.write_text(text, encoding="utf-8")
        return check_table(path, **arguments)

    return call


def cells(report):
    return [(finding.row, finding.column) for finding in report.findings]


@pytest.mark.parametrize(
    ("precision", "recall"), [("92.44", "92.44"), ("90.00", "95.02"), ("97.00", "88.29")]
)
def test_the_six_impossible_cells_of_the_paper(check, precision, recall):
    report = check(PAPER.format(precision=precision, recall=recall))
    assert cells(report) == [
        ("row 1 (CNN)", "F1-score"),
        ("row 1 (CNN)", "IoU"),
        ("row 2 (LeNet)", "IoU"),
        ("row 3 (AlexNet)", "F1-score"),
        ("row 3 (AlexNet)", "IoU"),
        ("row 3 (AlexNet)", "MSE"),
    ]
    assert report.notes == ()
    words = [finding.reasons[0] for finding in report.findings]
    # Harmonic mean of 93.225 and 95.415 is 94.307, which 94.31 - 0.005 is not above; 0.98645 gives
    # IoU >= 0.97326; 6.345^2 = 40.259.
    assert words[0].startswith(
        "at most 94.31 goes with Precision 93.22 and Recall 95.41 (one class"
    )
    assert words[1].startswith("at least 97.33 goes with Dice 98.65")
    assert words[5].startswith("at least 40.26 goes with MAE 6.35")


def medmnist_table():
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("Set", "Method", "Test n", "AUC", "ACC"))
    for line in MEDMNIST.splitlines():
        name, n, *scores = line.split()
        for method, score in zip(METHODS, scores, strict=True):
            writer.writerow((name, method, n, *score.split("/")))
    return table.getvalue()


def test_the_tables_of_medmnist_pass(check):
    report = check(medmnist_table())
    assert report.findings == ()
    # 9 of the 12 sets have their number of test images.
    assert report.cells == 12 * 7 * 2 + 9 * 7
    # Three runs give .863 on 156 images (404 of 468), one run does not.
    (note,) = report.notes
    assert note.startswith("note: ACC against n (whole cases, each right or wrong): possible only")
    assert "(Breast, R18-28)" in note


FLAGGED = [
    # F1 of averages: at most the harmonic mean, at least P + R - 1.
    ("precision,recall,f1\n0.80,0.60,0.70\n", {}, "at most 0.69 goes with precision 0.80"),
    ("precision,recall,f1\n0.9,0.9,0.6\n", {}, "at least 0.7 goes"),
    # One class in one run: 2 0.8 0.6 / 1.4 = 0.686.
    (
        "precision,recall,f1\n0.80,0.60,0.65\n",
        {"binary": True, "runs": 1},
        "at least 0.68 goes with precision 0.80 and recall 0.60 (one class in one run)",
    ),
    ("dice;iou\n0,80;0,60\n", {}, "at least 0.66 goes"),
    ("dice,iou\n80.0%,82.0%\n", {}, "at most 80.1 goes"),
    ("mae,rmse\n2.0,1.8\n", {}, "at least 1.9 goes"),
    ("mae,mse,range\n2.00,9.00,4.00\n", {}, "at most 8.03 goes"),
    ("mae,rmse,range\n0.10,0.50,1.00\n", {}, "at most 0.32 goes"),
    ("rmse,mse\n3.0,8.0\n", {}, "at least 8.7 goes"),
    ("rmse,mse\n3.0,9.5\n", {"runs": 1}, "at most 9.3 goes"),
    ("sensitivity,specificity,accuracy\n0.80,0.90,0.95\n", {"binary": True}, "at most 0.91 goes"),
    # 0.25 * 0.8 + 0.75 * 0.9 = 0.875.
    (
        "sensitivity,specificity,accuracy,n,positives\n0.80,0.90,0.82,400,100\n",
        {},
        "at least 0.87 goes with sensitivity 0.80 and specificity 0.90 and 100 positives of 400",
    ),
    (
        "sens,spec,balanced accuracy\n0.80,0.90,0.87\n",
        {"binary": True},
        "at most 0.86 goes with sens 0.80 and spec 0.90",
    ),
    # By Bayes 0.08 / (0.08 + 0.09) = 0.47.
    ("sens,spec,ppv,prevalence\n0.80,0.90,0.80,10%\n", {"runs": 1}, "at most 0.50 goes"),
    # 0.81 / (0.81 + 0.02) = 0.976.
    ("sens,spec,npv,prevalence\n0.80,0.90,0.90,0.10\n", {"runs": 1}, "at least 0.97 goes"),
    ("n,accuracy\n20,0.93\n", {"runs": 1}, "at most 0.90 or at least 0.95 goes with n 20"),
    ("n,accuracy,runs\n20,0.94,2\n", {}, "at most 0.93 or at least 0.95 goes with n 20 and 2 runs"),
    ("positives,sensitivity,runs\n7,0.50,1\n", {}, "at most 0.43 or at least 0.57 goes"),
    ("n,positives,specificity\n20,13,0.50\n", {"runs": 1}, "at most 0.43 or at least 0.57 goes"),
    ("n,positives,negatives\n20,13,8\n", {}, "at least 21 goes"),
    ("n,positives\n20,21\n", {}, "at most 20 goes"),
    ("tp,fp,fn,tn,n\n8,2,4,6,21\n", {}, "at most 20 goes"),
    # tp 8, fp 2, fn 4, tn 6: accuracy 0.7; F1 of the class 16/22, of both 0.697, weighted 0.709.
    ("tp,fp,fn,tn,accuracy\n8,2,4,6,0.75\n", {}, "at most 0.70 goes with tp 8 and fp 2"),
    ("tp,fp,fn,tn,f1\n8,2,4,6,0.75\n", {}, "at most 0.73 goes"),
    ("auc\n0.91\n1.20\n0.85\n", {}, "auc is at most 1, and the column is read as fractions"),
    ("auc (%)\n91\n101\n", {}, "auc is at most 100 percent"),
    ("auc\n0.91\n0.85\n91.2\n", {}, "auc is at most 1"),
    ("accuracy\n0.9\n-0.2\n", {}, "accuracy is at least 0"),
    ("mae\n-3.1\n", {}, "mae is at least 0"),
    ("mcc\n-1.2\n0.5\n0.6\n", {}, "mcc is at least -1"),
    ("n,auc\n12.5,0.9\n", {}, "a count is a whole number"),
    ("auc\n0.91 (0.93-0.95)\n", {}, "its interval begins above it"),
    ("auc\n0.91 [0.82; 0.89]\n", {}, "its interval ends below it"),
    ("auc\n91.0% (95% CI: 95.0–88.0)\n", {}, "its interval ends below where it begins"),
    ("auc,auc 95% CI lower,auc upper\n0.91,0.93,0.95\n", {}, "its interval begins above it"),
    ("auc\n0.91 ± -0.02\n", {}, "a spread is not negative"),
]


@pytest.mark.parametrize(("table", "known", "why"), FLAGGED)
def test_flagged_by_hand(check, table, known, why):
    (finding,) = check(table, **known).findings
    assert finding.reasons[0].startswith(why)


PASSING = [
    # Where both are rounded they may touch.
    ("auc\n0.91 (0.92-0.95)\n", {}),
    # On the edge: what rounds to 0.80 and 0.60 allows a little more than 0.6857.
    ("precision,recall,f1\n0.80,0.60,0.69\n", {}),
    ("precision,recall,f1\n0.9,0.9,0.7\n", {}),
    # A digit less says less.
    ("mae,mse\n2,2.3\n", {}),
    ("rmse,mse\n3.0,9.5\n", {"runs": 2}),
    # Sizes of one test set and its splits are not mixed.
    ("dice (liver),iou (spleen)\n0.90,0.10\n", {}),
    ("train dice,test iou\n0.90,0.10\n", {}),
    ("train accuracy,n\n0.93,20\n", {"runs": 1}),
    # Three classes: accuracy outside of macro recall and specificity.
    ("accuracy,macro recall,specificity\n0.50,0.80,0.90\n", {"binary": True}),
    # A mean IoU over background and lesion beside the lesion's Dice.
    ("dice,mIoU\n0.60,0.70\n", {}),
    ("precision,recall,macro f1\n0.10,0.20,0.60\n", {}),
    ("mae (mm),mse (cm²)\n5.0,0.3\n", {}),
    ("mae,mse (%)\n0.30,5.0\n", {}),
    ("auc\n0.91 (0.88-0.94)\n0.99 ± 0.02\n0.9 [0.86; 0.9]\n", {}),
    ("auc\n91% (0.88-0.93)\n", {}),
    # What is called percent by its column, or by the others, may be percent.
    ("accuracy,prevalence\n93.1,0.8\n88.2,0.9\n", {}),
    ("precision,recall,f1\n0.8,40.1,0.9\n0.9,30.2,1.0\n", {}),
    ("tp,fp,fn,tn,accuracy\n0.93,0.07,0.04,0.96,0.99\n", {}),
    ("tp,fp,fn,tn,precision\n0,0,4,6,1.0\n", {}),
]


@pytest.mark.parametrize(("table", "known"), PASSING)
def test_possible_by_hand(check, table, known):
    assert check(table, **known).findings == ()


def test_what_is_not_checked_is_said(check):
    report = check(
        "Model,epochs,Dice,mIoU,DSC,MAE (mm),MSE (m2),PPV,Recall,F1,Dice loss\n"
        "a,3,0.80,0.60,0.70,<5,3.0,0.9,0.8,0.80,0.1\n"
        "b,4,n/a,0.61,0.70,1.0,0.1,9.0,0.8,,0.1\n"
    )
    assert cells(report) == []
    assert report.notes == (
        "not checked: column 'epochs' is no metric that this check knows",
        "not checked: column 'Dice loss' is no metric that this check knows",
        "not checked: column 'DSC' against the others, as 'Dice' means the same",
        "not checked: 'Dice' against 'mIoU': they are averaged in other ways",
        "not checked: 'mIoU' against 'DSC': they are averaged in other ways",
        "not checked: 'MAE (mm)' against 'MSE (m2)': percents or other units of errors cannot be "
        "compared",
        "not checked: row 1 (a), MAE (mm) = '<5' is not read as a number",
        "note: column 'PPV' has numbers up to 1 and above it: write % in its name if they are "
        "percents",
    )


@pytest.mark.parametrize(
    ("header", "metric", "group", "average", "end", "percent"),
    [
        ("Sensitivity", "recall", (), "", "", False),
        ("Recall (Sensitivity) %", "recall", (), "", "", True),
        ("F1-Score (macro)", "f1", (), "macro", "", False),
        ("weighted_avg_precision", "precision", (), "weighted", "", False),
        ("Val. Dice [liver] ↑", "dice", ("liver", "val"), "", "", False),
        ("mIoU, %", "iou", (), "mean", "", True),
        ("AUC (95% CI)", "auc", (), "", "", False),
        ("AUC 95% CI lower", "auc", (), "", "low", False),
        ("Dice (mean ± SD)", "dice", (), "mean", "", False),
        ("Balanced Accuracy", "balanced_accuracy", (), "", "", False),
        ("test n", "n", (), "", "", False),
        ("R²", "r2", (), "", "", False),
    ],
)
def test_headers(header, metric, group, average, end, percent):
    column = read_header(header)
    assert (column.metric, column.group, column.average) == (metric, group, average)
    assert (column.end, column.percent) == (end, percent)


@pytest.mark.parametrize(
    "header",
    ["Dice loss", "Accuracy (std)", "AUC gap", "AUC CI", "TP (%)", "epoch", "", "Rank AUC"],
)
def test_headers_that_are_no_metric(header):
    assert read_header(header) is None


def test_cells():
    cell = read_cell("**86.20 %** ", "accuracy")
    assert (float(cell.estimate.value), float(cell.estimate.half)) == (86.2, 0.005)
    assert cell.estimate.percent and cell.interval is None
    assert float(read_cell("0,913", "auc").estimate.value) == 0.913
    assert read_cell("7,180", "n").estimate.value == 7180
    assert read_cell("7,180", "mae") is None
    assert float(read_cell("1.20e-3", "mse").estimate.half) == 0.000005
    assert float(read_cell("−0.3", "mcc").estimate.value) == -0.3
    low, high = read_cell("0.80 (95% CI 0.75–0.85)", "auc").interval
    assert (float(low.value), float(high.value)) == (0.75, 0.85)
    for text in ("<0.1", "0.8 0.9", "nan", "1e999", "0.1.2", "12%", "0x1", "9" * 40):
        assert read_cell(text, "n") is None


# What follows makes tables out of real predictions; nothing in them is impossible.


def printed(value, digits, percent):
    return f"{100 * value if percent else value:.{digits}f}"


def as_table(rows, shares, digits, style, data=()):
    """The rows `{column: value}` as csv; `shares` names the columns that may be percent."""
    names = list(rows[0])
    percent = dict.fromkeys(names, False)
    percent.update((name, style != "fraction") for name in shares)
    lines = [",".join(f"{name} (%)" if percent[name] and style == "%" else name for name in names)]
    for row in rows:
        sign = {name: "%" if percent[name] and style == "signs" else "" for name in names}
        lines.append(
            ",".join(
                str(value)
                if isinstance(value, int)
                else printed(value, digits, percent[name]) + sign[name]
                for name, value in row.items()
            )
        )
    return "\n".join(lines) + "\n"


STYLES = st.sampled_from(["fraction", "%", "signs"])
DIGITS = st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 1)


def two_class_row(tp, fp, fn, tn, *, undefined):
    truth = np.repeat([1, 0, 1, 0], [tp, fp, fn, tn])
    guess = np.repeat([1, 1, 0, 0], [tp, fp, fn, tn])
    settings = {"zero_division": undefined}
    row = {
        "accuracy": sk.accuracy_score(truth, guess),
        "precision": sk.precision_score(truth, guess, **settings),
        "sensitivity": sk.recall_score(truth, guess, **settings),
        "specificity": sk.recall_score(truth, guess, pos_label=0, **settings),
        "npv": sk.precision_score(truth, guess, pos_label=0, **settings),
        "f1": sk.f1_score(truth, guess, **settings),
    }
    row = {name: float(value) for name, value in row.items()}
    return row | {"balanced accuracy": (row["sensitivity"] + row["specificity"]) / 2}


@settings(max_examples=50)
@given(
    st.lists(st.tuples(*[st.integers(0, 40)] * 4).filter(any), min_size=1, max_size=3),
    st.sampled_from([0.0, 1.0]),
    DIGITS,
    STYLES,
    st.booleans(),
)
def test_one_run_of_two_classes_is_never_flagged(check, tables, undefined, digits, style, whole):
    rows = []
    for tp, fp, fn, tn in tables:
        row = two_class_row(tp, fp, fn, tn, undefined=undefined)
        counts = {"n": tp + fp + fn + tn, "positives": tp + fn}
        whole_counts = {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
        rows.append(row | counts | (whole_counts if whole else {}))
    shares = [name for name, value in rows[0].items() if not isinstance(value, int)]
    report = check(as_table(rows, shares, digits, style), binary=True, runs=1)
    assert report.findings == ()


def averaged(rows):
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@settings(max_examples=40)
@given(
    st.integers(2, 6), st.integers(5, 60), st.integers(1, 5), st.booleans(), DIGITS, STYLES, SEEDS
)
def test_means_over_classes_and_runs_are_never_flagged(
    check, classes, n, runs, weighted, digits, style, seed
):
    rng = np.random.default_rng(seed)
    truth, found = rng.integers(0, classes, n), []
    for _ in range(runs):
        guess = np.where(rng.random(n) < rng.random(), truth, rng.integers(0, classes, n))
        p, r, f1, _ = sk.precision_recall_fscore_support(
            truth, guess, average="weighted" if weighted else "macro", zero_division=0
        )
        accuracy = sk.accuracy_score(truth, guess)
        found.append({"accuracy": accuracy, "precision": p, "recall": r, "f1": f1})
    row = averaged(found) | {"n": n}
    table = as_table([row], ["accuracy", "precision", "recall", "f1"], digits, style)
    assert check(table).findings == ()
    assert check(table, runs=runs).findings == ()


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 5), DIGITS, STYLES, SEEDS)
def test_runs_on_one_test_set_are_never_flagged(check, positives, runs, digits, style, seed):
    rng = np.random.default_rng(seed)
    negatives, found = int(rng.integers(1, 9)), []
    for _ in range(runs):
        tp, tn = int(rng.integers(0, positives + 1)), int(rng.integers(0, negatives + 1))
        found.append(two_class_row(tp, negatives - tn, positives - tp, tn, undefined=0.0))
    row = averaged(found)
    table = [row | {"positives": positives, "negatives": negatives, "runs": runs}]
    assert check(as_table(table, list(row), digits, style), binary=True).findings == ()


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 3), DIGITS, STYLES, SEEDS)
def test_means_over_masks_are_never_flagged(check, images, classes, digits, style, seed):
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes, 12)) < rng.random()
    guess = np.where(rng.random(truth.shape) < rng.random(), truth, rng.random(truth.shape) < 0.5)
    both, either = (truth & guess).sum(2), (truth | guess).sum(2)
    total = truth.sum(2) + guess.sum(2)
    kept = total > 0
    if kept.any():
        dice, iou = (2 * both[kept] / total[kept]).mean(), (both[kept] / either[kept]).mean()
        table = as_table([{"dice": dice, "iou": iou}], ["dice", "iou"], digits, style)
        assert check(table).findings == ()


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), DIGITS, st.sampled_from([0.05, 1.0, 30.0]), SEEDS)
def test_regressions_are_never_flagged(check, n, runs, digits, size, seed):
    rng = np.random.default_rng(seed)
    errors = rng.uniform(-size, size, (runs, n))
    if seed % 3 == 0:  # The edge: errors of one size, and of the whole range.
        errors = np.where(errors < 0, -size, size)
    mse = (errors**2).mean(1)
    row = {"mae": np.abs(errors).mean(), "mse": mse.mean(), "rmse": np.sqrt(mse).mean()}
    text = as_table([{name: float(value) for name, value in row.items()}], [], digits, "fraction")
    header, numbers = text.splitlines()
    assert check(text, runs=runs).findings == ()
    assert check(f"{header},range\n{numbers},{size}\n", runs=runs).findings == ()


# The command.


def command(capfd, *arguments):
    try:
        code = run_tool(tool.main, [str(part) for part in arguments])
    except SystemExit as end:
        code = end.code
    return code, *capfd.readouterr()


def test_the_command(tmp_path, capfd):
    path = tmp_path / "table.csv"
    path.write_text("model,dice,iou\nA,0.90,0.50\n\x1b[31mB,0.90,0.85\n", encoding="utf-8")
    code, output, error = command(capfd, "check", path)
    assert (code, error) == (1, "")
    assert output.splitlines() == [
        "row 1 (A), iou = 0.50: at least 0.81 goes with dice 0.90 (one image, or means over the "
        "same images and classes)",
        "1 of 4 numbers flagged",
    ]
    path.write_text("model,n,accuracy\nA,20,0.93\n", encoding="utf-8-sig")
    assert command(capfd, "check", path)[0] == 0
    assert command(capfd, "check", path, "--runs=1")[0] == 1
    assert command(capfd, "check", path, "--runs=0")[0] == 2


def test_the_help_says_what_the_exit_code_means(capfd):
    code, output, _ = command(capfd, "check", "--help")
    assert code == 0
    assert "0 nothing is flagged, 1 a cell is flagged, 2 the table could not be read" in output
    assert "sensitivity" in output


MISTAKES = [
    (b"", "is empty"),
    (b"0.9,0.8\n0.7,0.6\n", "has no header"),
    (b"model,dice\n", "has a header but no row"),
    (b"model,epochs\na,3\n", "can be checked; these are: accuracy"),
    (b"dice,iou\n0.9\n", "line 2: 1 cells under a header of 2"),
    (b"dice,dice\n0.9,0.8\n", "has the column 'dice' twice"),
    (b'dice,iou\n"0.9,0.8\n', "line 2: unexpected end of data"),
    (b"\xff\xfedice", "is not UTF-8"),
    (b"dice\n" + b"0" * MOST_BYTES, "is larger than 256 KiB"),
    (b"dice" + b"," * MOST_COLUMNS + b"\n", "more than 100 columns"),
    (b"dice," + b"(" * (MOST_LETTERS + 1) + b"\n", "more than 200 letters"),
]


@pytest.mark.parametrize(("content", "words"), MISTAKES)
def test_mistakes_are_one_line(tmp_path, capfd, content, words):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    code, output, error = command(capfd, "check", path)
    assert (code, output) == (2, "")
    assert words in error and error.count("\n") == 1


def test_a_missing_file_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="is not a file: give the path of a table"):
        check_table(tmp_path / "none.csv")
