"""Put what commands printed between the markers of README.md and docs/, so that nobody types a number.

python tools/readme.py demo runs/demo       the printed tables into docs/results.md, the report's pictures into docs/
python tools/readme.py compare runs/table   table.md into docs/results.md, table.json and tune.json into docs/results/,
                                            tune.md as docs/tuning.md, and the README's table
python tools/readme.py ablation runs/ablate table.md into docs/diagnostics.md, table.json into docs/results/
python tools/readme.py card runs/mine       its run card into docs/run-card.md
python tools/readme.py reliability           what make soak and make fuzz found into docs/reliability.md
python tools/readme.py digits               the README's table from docs/results/digits-30.json
python tools/readme.py pairs docs/results/digits-30.json ar-at at     prints differences of two rows, paired by seed
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
DIGITS = DOCS / "results" / "digits-30.json"
TUNING_TITLE = "# What was tried for the table of baselines, on validation images\n\n"


def put(page: Path, block: str, text: str) -> None:
    before, opened, rest = page.read_text().partition(f"<!-- {block} -->")
    _, closed, after = rest.partition(f"<!-- /{block} -->")
    if not (opened and closed):
        sys.exit(f"{page} needs the lines <!-- {block} --> and <!-- /{block} -->")
    page.write_text(f"{before}{opened}\n{text.strip()}\n{closed}{after}")


def digits() -> str:
    """The README's table: clean, PGD-20 and AutoAttack accuracy of each row."""
    columns = {"clean": "clean_acc", "PGD-20": "robust_acc_pgd20", "AutoAttack": "robust_acc_aa"}
    lines = [["defense", *columns], ["---", *["---:"] * len(columns)]]
    for row in json.loads(DIGITS.read_text())["rows"]:
        values = (row[key] for key in columns.values())
        lines.append([row["defense"], *(f"{100 * v['mean']:.2f} ± {100 * v['std']:.2f}" for v in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(table: Path, one: str, other: str) -> None:
    rows = {row["defense"]: row for row in json.loads(table.read_text())["rows"]}
    for key in ("clean_acc", "robust_acc_aa", "sum"):
        values = (rows[name][key]["values"] for name in (one, other))
        found = [100 * (a - b) for a, b in zip(*values, strict=True)]
        error = statistics.stdev(found) / len(found) ** 0.5
        above = sum(d > 0 for d in found)
        print(f"{key}: {statistics.fmean(found):+.1f}, standard error {error:.1f}, above with {above} of {len(found)}")


def main(block: str, *rest: str) -> None:
    folder = Path(rest[0]) if rest else ROOT
    if block == "demo":
        put(DOCS / "results.md", "demo", f"```text\n{(folder / 'printed.txt').read_text().strip()}\n```")
        for name in ("curves.png", "examples.png"):
            shutil.copy(folder / "report" / name, DOCS / name)
    elif block == "compare":
        put(DOCS / "results.md", "compare", (folder / "table.md").read_text())
        shutil.copy(folder / "table.json", DIGITS)
        shutil.copy(folder / "tune.json", DOCS / "results" / "digits-30-tuning.json")
        (DOCS / "tuning.md").write_text(TUNING_TITLE + (folder / "tune.md").read_text())
        put(README, "digits", digits())
    elif block == "ablation":
        put(DOCS / "diagnostics.md", "ablation", (folder / "table.md").read_text())
        shutil.copy(folder / "table.json", DOCS / "results" / "ablation.json")
    elif block == "card":
        put(DOCS / "run-card.md", "card", f"```text\n{(folder / 'card.txt').read_text().strip()}\n```")
    elif block == "digits":
        put(README, "digits", digits())
    elif block == "reliability":
        import fuzz
        import soak

        put(DOCS / "reliability.md", "soak", soak.in_words(json.loads((DOCS / "results" / "soak.json").read_text())))
        results = json.loads((DOCS / "results" / "fuzz.json").read_text())
        put(DOCS / "reliability.md", "fuzz", "\n".join([fuzz.HEADING, *map(fuzz.row, results)]))
    elif block == "pairs":
        pairs(folder, *rest[1:])
    else:
        sys.exit(f"unknown block {block!r}: demo, compare, ablation, card, digits, reliability or pairs")


if __name__ == "__main__":
    main(*sys.argv[1:])
