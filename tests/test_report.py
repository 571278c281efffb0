"""The report is a pure function of the committed tables."""

import csv

import pytest

from bench import report, results
from bench.common import COLUMNS


def row(**cells):
    base = dict.fromkeys(COLUMNS, "") | {
        "stage": "pass", "model": "llama-2-7b", "targets": "all-linear", "rank": "16", "batch": "8", "length": "512",
        "variant": "plain", "basis": "measured", "ms": "250", "iqr_ms": "1", "runs": "5",
        "device": "NVIDIA H100", "driver": "1", "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip
    return base | cells


def folder(tmp_path, rows):
    with (tmp_path / "llm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return results.Results(tmp_path)


def test_committed_report_is_what_the_tables_give():
    assert report.OUTPUT.read_text(encoding="utf-8") == report.render(results.Results())


def test_rendering_twice_gives_the_same_bytes():
    found = results.Results()
    assert report.render(found) == report.render(results.Results())


def test_report_without_any_measurement_says_so(tmp_path):
    text = report.render(results.Results(tmp_path))
    assert "Not measured yet." in text
    assert "| open |" in text
    assert "nan" not in text.lower().split()


def test_verdicts_follow_the_rows(tmp_path):
    rows = [
        row(),
        row(variant="core/full", ms="255", ratio="1.02", above_plain_mib="12"),
        row(variant="factor/diagonal", ms="300", ratio="1.2", above_plain_mib="500"),
        row(stage="merge", variant="SST-Merge global: subspace + filter + export", ms="900"),
        row(stage="end to end", variant="SST-Merge global", ms="20000"),
        row(stage="merge", variant="PEFT dare_linear_svd", ms="400000", basis="scaled"),
    ]
    targets = report.render(folder(tmp_path, rows)).split("## From 7B")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in targets if line.startswith("| ")]
    verdict = {line[0]: line[-1] for line in cells}
    assert verdict["Fisher pass (core/full) over plain forward + backward"] == "met"
    assert verdict["factor/diagonal over plain"] == "missed"
    assert verdict["GEVP + filter + export, all 224 modules, core space"] == "met"
    assert verdict["PEFT dare_linear_svd over SST-Merge end to end"] == "met"
    assert verdict["factor/kronecker_lowrank l=64 over plain"] == "open"


def test_a_reading_stands_beside_both_plain_steps_of_its_batch(tmp_path):
    rows = [
        row(),
        row(variant="core/full", ms="255", ratio="1.02"),
        row(stage="evidence", variant="plain, harm", ms="200", ratio="1"),
        row(stage="evidence", variant="plain, logits at labels, harm", ms="160", ratio="0.8"),
        row(stage="evidence", variant="plain, logits at labels, benign", ms="180", ratio="0.9"),
        row(stage="evidence", variant="evidence, harm, one loss", ms="200", ratio="1.01"),
        row(stage="evidence", variant="evidence, benign, 2 draws", ms="270", ratio="1.8"),
        row(stage="decision", variant="filter(mu)", ms="300", batch="", length="", note="1 + 2 rows, scaled"),
        row(stage="merge", variant="SST-Merge global: subspace + filter + export", ms="900"),
        row(stage="gevp", variant="global, subspace() with 4 held-out folds", ms="800", floor_ms="400"),
    ]
    text = report.render(folder(tmp_path, rows))
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    cells = {line[0]: line[2:] for line in lines if len(line) == 5}
    assert cells["Fisher pass (core/full) over plain forward + backward"] == ["1.02x", "≤ 1.05x", "met"]
    assert cells["evidence, harm, one loss over plain"] == ["1.01x", "≤ 1.15x", "met"]
    assert cells["evidence, benign, 2 draws over plain"] == ["1.80x", "≤ 1.75x", "missed"]
    assert cells["the same and the solve of the input filter"] == ["1.20 s", "≤ 1.00 s", "missed"]
    assert cells["subspace() with 4 held-out folds over its floor"] == ["2.00x", "≤ 3.00x", "met"]
    readings = {line[0]: line[3:] for line in lines if len(line) == 6 and line[2] != "time"}
    assert readings["harm, one loss"] == ["≤ 1.15x", "1.01x, met", "1.25x, missed"]
    assert readings["benign, 2 draws"] == ["≤ 1.75x", "1.80x, missed", "1.50x, met"]


def test_the_last_measurement_of_a_subject_stands(tmp_path):
    found = folder(tmp_path, [row(ms="1"), row(ms="2"), row(ms="", basis="skipped")])
    assert [r["ms"] for r in found.all(variant="plain")] == ["2"]
    assert found.one(variant="core/full") is None


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0123, "12.3 µs"),
        (5.678, "5.68 ms"),
        (123.4, "123 ms"),
        (9.996, "10.0 ms"),
        (4567, "4.57 s"),
        (7e5, "11.7 min"),
        (None, "–"),
    ],
)
def test_durations(ms, text):
    assert results.milliseconds(ms) == text


def test_the_verdict_comes_first_and_says_what_was_measured(tmp_path):
    rows = [
        row(variant="core/full", ms="255", ratio="1.02"),
        row(stage="merge", variant="SST-Merge global: subspace + filter + export", ms="900"),
        row(stage="merge", variant="dense K-FAC pencils (torch)", ms="9000"),
        row(stage="merge", variant="PEFT dare_linear_svd", ms="1800"),
        row(stage="end to end", variant="SST-Merge global", ms="3600"),
    ]
    verdict = " ".join(report.render(folder(tmp_path, rows)).split("## ")[1].split())
    assert verdict.startswith("Verdict")
    assert "1.02x of a plain step on llama-2-7b" in verdict
    assert "K-FAC's pencils takes 10.0x of our merge's time" in verdict
    assert "SVD merges take 2.00x to 2.00x of our time" in verdict
    assert "we take 2.00x of PEFT" in verdict


def test_sizes():
    assert results.size(7 * 2**30) == "7.00 GiB"
    assert results.size(1023) == "1020 B"
    assert results.size(0) == "0.00 B"
