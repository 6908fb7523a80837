"""The report's page in a real browser: nothing off screen, no letters too small, no errors, nothing asked of a network."""

import json
import shutil

import pytest
from small import trained

from fastarat.data import load_dataset
from fastarat.defenses import ARAT
from fastarat.evaluation import evaluate
from fastarat.report import report
from fastarat.runs import Run, load_network

PROGRAM = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("needs Chromium: sh tools/install_chromium.sh")
    from chromium import Browser

    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Every section of the page, filled: two runs, one of a long name, with all that evaluations and metrics may hold."""
    root = tmp_path_factory.mktemp("runs")
    first = root / "ar-at-with-a-name-that-nobody-would-want-to-type-twice-seed0"
    runs = [trained(first, defense=ARAT(), epochs=2, limit_train=64, device="cpu"), root / "another-seed1"]
    shutil.copytree(*runs)
    card = runs[1] / "card.txt"
    card.write_text(card.read_text().replace("AR-AT", "something else"))
    for number, run in enumerate(runs):
        model, *_ = load_network(run)
        evaluate(model, load_dataset("digits").test, "clean,pgd-20", limit=20, progress=False).save(run / "eval.json")
        enrich(run, number)
        rows = Run(run).metrics()
        for row in rows:
            row |= {"diag/grad_sim": 0.1 * row["epoch"] + number, "diag/rep_distance": 2.0}
            row |= {"diag/rep_distance/layer4.0.a-rather-long-name-of-a-layer.bn1": 2.0}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return report(runs, root / "report", num_images=3, device="cpu")


def enrich(run, number=0):
    """Add to a saved evaluation what `eval --curves` and per-class counts add."""
    record = json.loads((run / "eval.json").read_text())
    del record["sha256"]
    record["class_counts"] = [2] * 10
    record["per_class"] = {"clean_acc": [2] * 5 + [1] * 5, "robust_acc_pgd20": [number] * 10}
    record["confusion"] = {"robust_acc_pgd20": [[1 + (i == j) for j in range(10)] for i in range(10)]}
    record["curves"] = {
        "num_images": 20,
        "epsilon": {"values": [0.0, 0.1, 0.2], "accuracy": [0.9, 0.4321, 0.1], "num_steps": 20},
        "steps": {"values": [1, 10, 100], "accuracy": [0.5, 0.41, 0.4], "epsilon": 0.1},
    }
    (run / "eval.json").write_text(json.dumps(record))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable(browser, page, width, scheme):
    assert browser.look(page, width, scheme) == []
    browser.value("document.getElementById('by-time').click()")
    shown = "getComputedStyle(document.querySelector('.grid.%s')).display"
    assert [browser.value(shown % name) for name in ("epoch", "time")] == ["none", "grid"]
    assert "off screen" not in " ".join(browser.look(page, width, scheme))


def test_dark_mode_reaches_the_figures(browser, page):
    title = "getComputedStyle(document.querySelector('figure svg text')).fill"
    colours = []
    for scheme in ("light", "dark"):
        browser.open(page, 390, scheme)
        colours.append((browser.value(title), browser.value("getComputedStyle(document.body).backgroundColor")))
    assert colours[0][1] == "rgb(255, 255, 255)"
    assert colours == [colours[0], (colours[1][0], "rgb(21, 23, 26)")]
    assert colours[0][0] != colours[1][0]


def test_a_point_tells_its_value(browser, page):
    browser.open(page, 1280)
    browser.value("document.querySelector('.strength .hit').scrollIntoView({block: 'center'})")
    where = browser.value(
        "(() => { const b = document.querySelectorAll('.strength .hit')[1].getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])
    told = browser.value("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert "43.21% at 25.5 epsilon" in told


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("<div style='width: 2000px'>wide</div>", "page is 20"),
        ("<p style='position: absolute; left: -50px'>lost</p>", "off screen"),
        ("<p style='font-size: 8px'>tiny</p>", "letters of 8.0 px"),
        ("<script>console.error('broken')</script>", "console: broken"),
        ("<script>nothing.at.all()</script>", "error: Uncaught"),
        ("<img src='http://127.0.0.1:9/x.png' alt=''>", "asks for http://127.0.0.1:9/x.png"),
        ("<style>@import 'http://127.0.0.1:9/x.css'</style>", "asks for http://127.0.0.1:9/x.css"),
    ],
)
def test_the_look_finds_what_is_planted(browser, page, tmp_path, planted, words):
    file = tmp_path / "page.html"
    file.write_text(page.read_text().replace("</body>", planted + "</body>"))
    found = browser.look(file, 390)
    assert any(words in text for text in found), found


def test_print_shows_the_chosen_axis_and_no_switch(browser, page):
    found = browser.look(page, 800, media="print")
    assert not [text for text in found if "letters" not in text]
    assert browser.value("getComputedStyle(document.querySelector('.switch + label')).display") == "none"
    assert browser.value("getComputedStyle(document.querySelector('.grid.time')).display") == "none"
