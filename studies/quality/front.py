"""The picture and the table of the README, out of the study's rows: `python studies/quality/front.py`.

Writes docs/pictures/headline.png and the rows between the README's two `front.py` marks. The picture carries the SHA-256 of the
rows that it shows, so that a test can tell when it is older than they are.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "studies" / "quality" / "results" / "compare.csv"
PICTURE = ROOT / "docs" / "pictures" / "headline.png"
README = ROOT / "README.md"
MARK = "<!-- studies/quality/front.py -->\n"

# Okabe and Ito's colours, which colour-blind readers tell apart. Method: label, colour, mark.
SERIES = {
    "sst": ("SST-Merge", "#0072B2", "o"),
    "regmean": ("RegMean", "#D55E00", "s"),
    "plain": ("plain addition", "#555555", "^"),
}
# Beside which point (its refusal rate in per cent) a label stands, and how far off.
LABEL_AT = {"sst": 64, "regmean": 78, "plain": 63}
LABEL_BY = {"sst": (-78, 6), "regmean": (-24, 9), "plain": (14, -4)}
# What the table sets side by side: no patch, and pairs of about the same refusal rate.
TABLE = {
    ("no patch", 0.0): "no patch",
    ("plain", 0.3): "plain addition, α = 0.3",
    ("sst", 0.002): "**SST-Merge**, 0.002 predicted",
    ("regmean", 0.3): "RegMean, 0.3",
}


def rows() -> list[dict[str, str]]:
    with ROWS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def shown(found: list[dict[str, str]]) -> str:
    """SHA-256 of what the picture shows."""
    used = [
        (r["method"], r["refusal_rate"], r["benign_kl"], r["kl_lo"], r["kl_hi"]) for r in found if r["method"] in SERIES
    ]
    return hashlib.sha256(repr(used).encode()).hexdigest()


def draw(found: list[dict[str, str]], path: Path) -> None:
    """Refusal over benign KL with its 95 % intervals, a labelled line a method; up and to the left is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.9), dpi=130)
    for method, (label, colour, mark) in SERIES.items():
        points = sorted(
            (float(r["benign_kl"]), 100 * float(r["refusal_rate"]), float(r["kl_lo"]), float(r["kl_hi"]))
            for r in found
            if r["method"] == method
        )
        x, y, low, high = zip(*points)
        spans = [[a - b for a, b in zip(x, low)], [b - a for a, b in zip(x, high)]]
        axes.errorbar(
            x, y, xerr=spans, color=colour, marker=mark, markersize=5, linewidth=1.8, elinewidth=0.8, capsize=2
        )
        i = min(range(len(y)), key=lambda j: abs(y[j] - LABEL_AT[method]))
        axes.annotate(
            label, (x[i], y[i]), xytext=LABEL_BY[method], textcoords="offset points", color=colour, weight="bold"
        )
    nothing = next(100 * float(r["refusal_rate"]) for r in found if r["method"] == "no patch")
    axes.axhline(nothing, color="#999999", linewidth=0.8, linestyle=":")
    axes.text(
        1.0, nothing + 1, "you are here: no patch", color="#777777", ha="right", transform=axes.get_yaxis_transform()
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("change of benign behaviour: KL, nats per label token (95 % intervals)")
    axes.set_ylabel("harmful prompts refused, %")
    axes.set_ylim(0, 104)
    axes.set_title("The same refusals for a sixth or less of the change", loc="left", weight="bold", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Rows": shown(found), "Software": None})
    plt.close(figure)


def table(found: list[dict[str, str]]) -> str:
    """The README's rows in Markdown."""
    by = {(r["method"], float(r["strength"])): r for r in found}
    out = ["| | harmful refused ↑ | safe refused ↓ | benign KL ↓ (95 %) |", "| --- | ---: | ---: | --- |"]
    for key, label in TABLE.items():
        r = by[key]
        kl = (
            "0"
            if float(r["benign_kl"]) == 0
            else f"{float(r['benign_kl']):.4f} ({float(r['kl_lo']):.4f}–{float(r['kl_hi']):.4f})"
        )
        refused, safe = (f"{int(100 * float(r[name]) + 0.5)} %" for name in ("refusal_rate", "over_refusal"))
        out.append(f"| {label} | {refused} | {safe} | {kl} |")
    return "\n".join(out) + "\n"


def main() -> None:
    found = rows()
    draw(found, PICTURE)
    text = README.read_text(encoding="utf-8")
    before, _, after = text.split(MARK)
    README.write_text(f"{before}{MARK}{table(found)}{MARK}{after}", encoding="utf-8")
    print(f"{PICTURE}, and {len(TABLE)} rows of {README}")


if __name__ == "__main__":
    main()
