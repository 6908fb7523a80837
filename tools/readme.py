"""Put what commands printed between the README's markers, so that nobody types a number.

python tools/readme.py demo runs/demo       the printed tables, and the report's pictures into docs/
python tools/readme.py compare runs/compare its table.md, and its tune.md as docs/tuning.md
python tools/readme.py pairs docs/results/digits-30.json ar-at at     prints differences of two rows, paired by seed
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def put(block: str, text: str) -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(f"<!-- {block} -->")
    _, _, after = rest.partition(f"<!-- /{block} -->")
    readme.write_text(f"{before}<!-- {block} -->\n{text.strip()}\n<!-- /{block} -->{after}")


if __name__ == "__main__":
    block, folder = sys.argv[1], Path(sys.argv[2])
    if block == "demo":
        put("demo", f"```text\n{(folder / 'printed.txt').read_text().strip()}\n```")
        for name in ("curves.png", "examples.png"):
            shutil.copy(folder / "report" / name, ROOT / "docs" / name)
    elif block == "compare":
        put("compare", (folder / "table.md").read_text())
        title = "# What was tried for the README's table, on validation images\n\n"
        (ROOT / "docs" / "tuning.md").write_text(title + (folder / "tune.md").read_text())
    elif block == "pairs":
        rows = {row["defense"]: row for row in json.loads(folder.read_text())["rows"]}
        one, other = (rows[name] for name in sys.argv[3:5])
        for key in ("clean_acc", "robust_acc_aa", "sum"):
            found = [100 * (a - b) for a, b in zip(one[key]["values"], other[key]["values"], strict=True)]
            error = statistics.stdev(found) / len(found) ** 0.5
            above = sum(d > 0 for d in found)
            print(
                f"{key}: {statistics.fmean(found):+.1f}, standard error {error:.1f}, above with {above} of {len(found)}"
            )
    else:
        sys.exit(f"unknown block {block!r}: demo, compare or pairs")
