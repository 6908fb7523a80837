"""The versions that the docs name are the ones that are pinned, and so the ones that the tests ran with."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_names_what_is_pinned():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    table = (ROOT / "docs" / "python.md").read_text().partition("## Beside other packages")[2]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", table, re.MULTILINE)
    assert len(rows) == 8
    assert {name: pins[name.lower()] for name, _ in rows} == dict(rows)


def test_whoever_installs_them_keeps_torch():
    script = (ROOT / "tools" / "install_neighbours.sh").read_text()
    assert script.count("-c constraints.txt") == script.count("pip install")
    assert 'if [ "$before" != "$after" ]' in script
