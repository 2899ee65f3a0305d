"""The logs of other programs, in each dialect of METHODS.md section 7."""

from __future__ import annotations

import pytest

from rsplugins.errors import ParameterError, RunError, UsageError
from rsplugins.runs.imports import claimed_parameters, import_log, read_log
from rsplugins.runs.merge import finish
from rsplugins.runs.summary import summarise
from rsplugins.runs.verify import verify

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
ORIGINAL = [
    "0\t3\t3\t1.22\t1\t0:00:18.103721",
    "20\t7\t7\t0.401\t1\t0:00:17.5",
    "40\t4\t-1\t0.0\t0\t0:00:17.0",
    "60\t2\t5\t0.7\t0\t1:00:00.25",
]
SECONDS = [line.rpartition("\t")[0] + f"\t{time}" for line, time in zip(ORIGINAL, (18.103721, 17.5, 17.0, 3600.25), strict=True)]
TOTAL = ["0\t3\t3\t1.22\t1\t18.103721", "20\t7\t7\t0.401\t2\t17.5", "40\t4\t-1\t0.0\t2\t17.0", "60\t2\t5\t0.7\t2\t3600.25"]
SIZES = [f"{line}\t0.99\t{1000 * k}" for k, line in enumerate(ORIGINAL, 1)]
LEVELS = [f"{line}\t{k}" for k, line in enumerate(ORIGINAL)]

CLAIMED = claimed_parameters(guarantee="probabilistic", norm="l2", alpha=0.001, sigma=0.5, n=100_000)


@pytest.mark.parametrize(
    ("lines", "dialect"),
    [
        ([HEADER, *ORIGINAL], {"header": True, "time": "H:MM:SS", "correct": "0/1", "extra_columns": []}),
        (ORIGINAL, {"header": False, "time": "H:MM:SS", "correct": "0/1", "extra_columns": []}),
        ([HEADER, *SECONDS], {"header": True, "time": "seconds", "correct": "0/1", "extra_columns": []}),
        (TOTAL, {"header": False, "time": "seconds", "correct": "running total", "extra_columns": []}),
        (
            [HEADER + "\tpA\tsamplesize", *SIZES],
            {"header": True, "time": "H:MM:SS", "correct": "0/1", "extra_columns": ["pA", "samplesize"]},
        ),
        (SIZES, {"header": False, "time": "H:MM:SS", "correct": "0/1", "extra_columns": ["pA", "samplesize"]}),
        (
            [HEADER + "\tlevels_needed", *LEVELS],
            {"header": True, "time": "H:MM:SS", "correct": "0/1", "extra_columns": ["levels_needed"]},
        ),
    ],
)
def test_every_dialect_gives_the_same_run(tmp_path, lines, dialect):
    path = tmp_path / "log.tsv"
    path.write_text("\n".join(lines) + "\n\n")
    log = import_log(path, tmp_path / "run", method="cohen", claimed=CLAIMED)
    assert (log.dialect, log.contradictions) == (dialect, ())
    summary = summarise(finish(tmp_path / "run", pages=False))
    assert (summary["inputs"], summary["correct"], summary["abstained"]) == (4, 2, 1)
    assert summary["acr"] == pytest.approx((1.22 + 0.401) / 4)
    assert summary["seconds"] == pytest.approx(18.103721 + 17.5 + 17.0 + 3600.25)
    assert summary["samples"] == (10_000 if "samplesize" in dialect["extra_columns"] else 400_000)
    assert (summary["sigma"], summary["alpha"], summary["n"], summary["imported"]) == (0.5, 0.001, 100_000, True)


def test_an_imported_run_says_that_it_cannot_be_recomputed(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("\n".join(ORIGINAL))
    import_log(path, tmp_path / "run", method="cohen", claimed=CLAIMED)
    run = finish(tmp_path / "run")
    assert "probabilistic, imported claim" in (tmp_path / "run" / "report.html").read_text()
    assert any("no evidence to recompute" in problem for problem in verify(run.directory)[1])
    changed = [line.replace("1.22", "1.23") for line in ORIGINAL]
    path.write_text("\n".join(changed))
    with pytest.raises(UsageError, match=r"imported\.sha256"):
        import_log(path, tmp_path / "run", method="cohen", claimed=CLAIMED)


def test_a_correct_column_that_contradicts_the_prediction_is_reported(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("\n".join([*ORIGINAL, "80\t1\t2\t0.5\t1\t0:00:01"]))
    assert read_log(path).contradictions == (80,)
    path.write_text("\n".join([*TOTAL, "80\t1\t2\t0.5\t3\t1.0"]))
    assert read_log(path).contradictions == (80,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no lines"),
        (HEADER, "no lines"),
        ("0\t1\t1\t0.5\t1", "line 1 is in no known dialect: it has 5 columns"),
        (ORIGINAL[0] + "\n1\tx\t1\t0.5\t1\t1.0", "line 2"),
        (HEADER.replace("radius", "r") + "\n" + ORIGINAL[0], "'radius'"),
        (ORIGINAL[0].replace("0:00:18", "18 minutes"), "line 1"),
    ],
)
def test_a_log_that_cannot_be_read_names_the_line(tmp_path, text, said):
    path = tmp_path / "log.tsv"
    path.write_text(text)
    with pytest.raises(RunError, match=said):
        read_log(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            ORIGINAL[1].replace("0.401", "-0.401"),
            r"log\.tsv line 2: its radius is -0\.401; expected .* of at least 0",
        ),
        (ORIGINAL[1].replace("0.401", "nan"), "line 2: its radius is nan"),
        (ORIGINAL[1].replace("0.401", "inf"), "line 2: its radius is inf"),
        (SECONDS[1].replace("17.5", "nan"), "line 2: its time is nan"),
        (TOTAL[1].replace("\t2\t", "\tinf\t"), "line 2: its correct is inf"),
        (SIZES[1].replace("0.99", "nan"), "line 2: its pA is nan"),
    ],
)
def test_numbers_that_no_claim_has_are_refused_with_file_and_line(tmp_path, line, said):
    path = tmp_path / "log.tsv"
    path.write_text((SIZES if line.count("\t") > 5 else ORIGINAL)[0] + "\n" + line)
    with pytest.raises(RunError, match=said):
        import_log(path, tmp_path / "run", method="cohen", claimed=CLAIMED)
    assert not (tmp_path / "run").exists()


def test_what_the_user_says_about_a_log_is_checked(tmp_path):
    with pytest.raises(ParameterError, match="needs its --alpha"):
        claimed_parameters(guarantee="probabilistic", norm="l2", alpha=None, sigma=None, n=None)
    with pytest.raises(ParameterError, match="Did you mean 'deterministic'"):
        claimed_parameters(guarantee="determinstic", norm="l2", alpha=None, sigma=None, n=None)
    with pytest.raises(ParameterError, match="--norm is 'l3'"):
        claimed_parameters(guarantee="estimate", norm="l3", alpha=None, sigma=None, n=None)
    with pytest.raises(UsageError, match="no file"):
        read_log(tmp_path / "none")
