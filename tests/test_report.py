"""The report of runs that were really trained: what its pictures show, what its text says, what it refuses."""

import dataclasses
import html
import html.parser
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fastarat.config import Config
from fastarat.data import load_dataset
from fastarat.defenses import ARAT, AT
from fastarat.errors import UserError
from fastarat.evaluation import adversarial_examples, collect, evaluate
from fastarat.files import load_weights
from fastarat.nets.batchnorm import SplitBatchNorm2d, branch
from fastarat.report import Examples, curves_figure, examples_figure, first_per_class, page, predicted, report, sections
from fastarat.report.figures import RIGHT, WRONG, visible
from fastarat.report.subjects import Subject, expanded, labels, read
from fastarat.runs import WEIGHTS, Run, load_network
from fastarat.specs import Attack
from fastarat.training import train

EPSILON = 0.2


@pytest.fixture
def quick(monkeypatch):
    """A page without the charts of training, which take a second or two, for tests of other things."""
    monkeypatch.setattr(sections, "curves", lambda *_, **__: [])
    monkeypatch.setattr(page, "curves_figure", lambda _: Figure((1, 1)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of AR-AT, evaluated, whose name needs escaping, and a run of AT, not evaluated."""
    root = tmp_path_factory.mktemp("runs")
    paths = []
    for name, defense in (("_ar|at <b>&$x$", ARAT()), ("at", AT())):
        config = Config(
            dataset="digits", defense=defense, limit_train=64, batch_size=32, model="resnet-small", epochs=1,
            tensorboard=False, device="cpu", out=str(root / name), attack=Attack(num_steps=1, epsilon=EPSILON),
        )  # fmt: skip
        paths.append(train(config, progress=False).run)
    model, *_ = load_network(paths[0])
    test = load_dataset("digits").test
    evaluate(model, test, "clean,pgd-2-2", epsilon=8 / 255, limit=20, progress=False).save(paths[0] / "eval.json")
    return paths


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the AT run, to be damaged."""
    return shutil.copytree(trained[1], tmp_path / "run")


def texts(figure):
    return [text.get_text() for text in figure.texts]


def pixels_of(png):
    image = Image.open(io.BytesIO(png) if isinstance(png, bytes) else png)
    image.load()
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(float)


def subject(label, rows=(), epsilon=0.1, best=None):
    meta = {"epsilon": epsilon, "norm": "linf"}
    return Subject(Path(label), label, list(rows), "", {}, nn.Identity(), meta, Config(), best)


def test_writes_three_files_and_the_page_stands_alone(trained, tmp_path):
    out = tmp_path / "new" / "folder"
    where = report(trained, out, num_images=5, device="cpu")
    assert where == out / "report.html"
    beside = {f"{name}.{kind}" for name in ("curves", "examples") for kind in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == beside | {"figures", "report.html"}
    charts = {p.name for p in (out / "figures").iterdir()}
    names = [name + time for name in ("loss", "terms", "clean", "robust", "lr") for time in ("", "-time")]
    names += ["classes-0", "confusion-0"]
    assert charts == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all(pixels_of(out / "figures" / f"{name}.png").shape[1] == 1000 for name in names)
    for name in ("curves.png", "examples.png"):
        shown = pixels_of(out / name)
        height, width, _ = shown.shape
        assert 1000 <= width <= 2000, "two screen pixels for each of README's 900"
        assert 800 <= height <= 4000
        assert shown.std() > 10
        assert np.ptp(shown, axis=2).max() > 50, "no colour"
    text = where.read_text()
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 2 * 5 * 3, "runs, images, versions"
    assert text.count("<svg") == len(names)
    assert not re.search(r'(src|href)="(?!data:|#)|@import|url\((?!#)|<script[^>]', text)
    assert "prefers-color-scheme: dark" in text


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its text without tags, with single spaces, and the tags with their attributes."""

    def __init__(self, where):
        super().__init__()
        self.parts, self.tags, self.attributes = [], [], []
        self.feed(where.read_text())
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.parts.append(data)


@pytest.mark.usefixtures("quick")
def test_page_names_attack_images_and_budget(trained, tmp_path):
    shown = Page(report(trained, tmp_path, num_images=2, device="cpu"))
    saved = json.loads((trained[0] / "eval.json").read_text())
    value, (low, high) = saved["accuracy"]["robust_acc_pgd2_r2"], saved["interval_95"]["robust_acc_pgd2_r2"]
    row = ["PGD-2 x2 restarts", "L∞ ε = 8/255", "20", f"{value:.2%}", f"{low:.2%} to {high:.2%}"]
    last = json.loads((trained[1] / "metrics.jsonl").read_text().splitlines()[-1])
    for words in (
        f"fastarat report: {trained[0].name}, at",
        f"{trained[0].name} last {' '.join(row)}",
        f"at not evaluated yet: fastarat eval {trained[1]}",
        "Accuracy on test images of digits, never seen in training.",
        *(
            " ".join(line.split("  ", 1)[1].split())
            for run in trained
            for line in (run / "card.txt").read_text().splitlines()
        ),
        f"{last['val/robust_acc_pgd10']:.2%} under PGD-10",
        f"train/loss {json.loads((trained[0] / 'metrics.jsonl').read_text())['train/loss']:.4g} {last['train/loss']:.4g}",
    ):
        assert words in shown.text, words


def test_text_of_run_folders_and_data_sets_is_never_markup(run, tmp_path, monkeypatch):
    """Names of the run, the data set, its classes, the defense and metrics, notes and warnings: all are escaped."""
    hostile = "<img src=x onerror=alert(1)>\"'&amp;</pre></td><script>alert(2)</script>{{ 7 * 191 }}"
    plain = Page(report([run], tmp_path / "plain", num_images=1, device="cpu"))
    run = run.rename(run.with_name(hostile.replace("/", "")))
    (run / "card.txt").write_text(f"defense        {hostile}\n")
    rows = [{**row, f"train/{hostile}": 1.0} for row in Run(run).metrics()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights, meta = load_weights(run / "last.safetensors")
    Run(run).save_weights("last", weights, {**meta, "defense": hostile, "classes": [hostile] * 10})
    record = {"settings": {"attacks": {"x": hostile}, "norm": hostile, "epsilon": 0.1}, "num_images": 5,
              "accuracy": {hostile: 0.5}, "warnings": [hostile]}  # fmt: skip
    (run / "eval.json").write_text(json.dumps(record))
    dataset = dataclasses.replace(load_dataset("digits"), name=hostile, classes=[hostile] * 10, notes=[hostile])
    monkeypatch.setattr(page, "load_data", lambda *_: dataset)
    examples = Examples(*(torch.zeros(1, 1, 8, 8),) * 2, *(torch.zeros(1, dtype=torch.long),) * 3)
    monkeypatch.setattr(page, "predicted", lambda *_, **__: examples)  # quicker
    shown = Page(report([run], tmp_path / "out", num_images=1, device="cpu"))
    assert set(shown.tags) <= {*plain.tags}, "a name became a tag"
    assert set(shown.attributes) == set(plain.attributes)
    assert shown.text.count(hostile) >= 7, "and what was written is what is read"
    assert "1337" not in shown.text


@pytest.mark.usefixtures("quick")
def test_evaluations_of_all_weights_are_shown(run, tmp_path):
    model, *_ = load_network(run)
    for which in WEIGHTS:
        evaluate(model, load_dataset("digits").test, "clean", limit=20, progress=False).save(Run(run).evaluation(which))
    text = Page(report([run], tmp_path, num_images=1, device="cpu")).text
    assert WEIGHTS == ("last", "best", "swa", "ema")
    for which in WEIGHTS:
        assert f"run {which} none (clean) 20 " in text


@pytest.mark.usefixtures("quick")
def test_rows_of_different_numbers_of_images_are_warned_of(run, tmp_path):
    model, *_ = load_network(run)
    test = load_dataset("digits").test
    for weights, limit in (("eval", 20), ("eval-best", 30)):
        evaluate(model, test, "clean", limit=limit, progress=False).save(run / f"{weights}.json")
    words = "not all of the same test images (20, 30): compare rows of one number only"
    assert words in report([run], tmp_path / "two", num_images=1, device="cpu").read_text()
    evaluate(model, test, "clean", limit=20, progress=False).save(run / "eval-best.json")
    assert "not all of the same" not in report([run], tmp_path / "one", num_images=1, device="cpu").read_text()


@pytest.mark.usefixtures("quick")
def test_default_folder_and_a_run_named_twice(run):
    assert report([run, str(run)], num_images=1, device="cpu") == run / "report" / "report.html"
    assert "<h1>fastarat report: run</h1>" in (run / "report" / "report.html").read_text()


@pytest.mark.usefixtures("quick")
def test_grid_shows_the_predictions_of_the_saved_model(trained, tmp_path, monkeypatch):
    drawn = []

    def keep(*args):
        drawn.append(examples_figure(*args))
        return drawn[-1]

    monkeypatch.setattr(page, "examples_figure", keep)
    report(trained, tmp_path, num_images=10, device="cpu")
    told = [t for t in drawn[0].texts if t.get_text()[:2] in ("✓ ", "✗ ")]

    images, labels = collect(load_dataset("digits").test)
    rows = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    images, labels = images[rows], labels[rows]
    expected = []
    for path in trained:
        model, *_ = load_network(path)
        attacked = adversarial_examples(model, images, labels, epsilon=EPSILON, num_steps=20)
        for x in (images, attacked):
            with torch.no_grad(), branch(model, "adv"):
                for prediction, label in zip(model(x).argmax(1).tolist(), labels.tolist(), strict=True):
                    expected.append(f"{'✓' if prediction == label else '✗'} {prediction}")
    assert [t.get_text() for t in told] == expected
    assert {text[0] for text in expected} == {"✓", "✗"}, "both kinds are needed for the test to say anything"
    assert {t.get_text()[0]: t.get_color() for t in told} == {"✓": RIGHT, "✗": WRONG}
    assert f"{trained[0].name}" in texts(drawn[0])
    shown = [axes.images[0].get_array() for axes in drawn[0].axes]
    assert len(shown) == 2 * 3 * 10
    assert np.array_equal(shown[0], images[0, 0])


def test_predictions_are_of_the_adv_branch_in_eval_mode():
    bn = SplitBatchNorm2d(2)
    for name, biases in (("clean", (9.0, 0.0)), ("adv", (0.0, 9.0))):
        with torch.no_grad():
            bn.branch_set(name).bias.copy_(torch.tensor(biases))
    model = nn.Sequential(bn, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    images = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = predicted(model, images, labels, epsilon=0.1, norm="linf", device=torch.device("cpu"))
    assert found.clean_pred.tolist() == found.adv_pred.tolist() == [1, 1, 1]
    assert found.correct() == (1, 1)
    assert 0 < (found.adversarial - images).abs().max() <= 0.1 + 1e-6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_first_image_of_each_class_then_the_second():
    split = load_dataset("digits").test
    labels = split.labels.tolist()
    first = [labels.index(digit) for digit in range(10)]
    second = [labels.index(digit, first[digit] + 1) for digit in range(2)]
    chosen = first_per_class(split, 12)
    assert chosen.indices.tolist() == split.indices[[*first, *second]].tolist()
    assert torch.equal(chosen.images, split.images[[*first, *second]])
    assert len(first_per_class(split, 10_000)) == len(split)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (1, 32, 48), (3, 224, 224)])
def test_grid_of_any_shape_shows_the_images(shape):
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(3, *shape, generator=g) * 0.5 + 0.25
    adversarial = clean + 0.1 * torch.randn(clean.shape, generator=g).sign()
    found = Examples(clean, adversarial, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), torch.tensor([2, 2, 2]))
    figure = examples_figure(
        [subject("a $run$")], [found], ["$a$ & _{", "a name that is far too long for the column", "_c"]
    )
    assert len(figure.axes) == 9
    for axes, picture in zip(figure.axes, [*clean, *adversarial], strict=False):
        image = axes.images[0]
        assert np.allclose(image.get_array(), picture[0] if shape[0] == 1 else picture.permute(1, 2, 0))
        assert (image.get_clim(), image.get_interpolation()) == ((0, 1), "nearest")
    # 5 times +-0.1, around the grey of 0.5, reaches black and white.
    assert any("× 5," in text for text in texts(figure))
    assert set(np.unique(figure.axes[6].images[0].get_array().round(4))) == {0, 1}
    told = [text for text in texts(figure) if text[:2] in ("✓ ", "✗ ")]
    assert [text[0] for text in told] == ["✓", "✓", "✗", "✗", "✗", "✓"]
    assert told[1].endswith("…")
    assert max(map(len, told)) < 25
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    height, width, _ = pixels_of(buffer.getvalue()).shape
    assert 400 <= width <= 1000
    assert 300 <= height <= 800


@pytest.mark.parametrize(
    ("largest", "factor", "scale"),
    [(8 / 255, 15, "15"), (0.1, 5, "5"), (0.5, 1, "1"), (1.0, 0.5, "0.5"), (0, 1, "1")],
)
def test_perturbation_scale(largest, factor, scale):
    difference = torch.tensor([[largest, -largest / 2]])
    assert visible(difference) == (factor, scale)


def test_curves_show_every_run_in_percent_with_drops_and_best_epoch():
    rates = [0.02, 0.1, 0.1, 0.01]
    rows = [
        {"epoch": i + 1, "lr": lr, "train/loss": 3.0 - i, "train/ce": 2.0 - i / 2, "train/kl": 1.0 - i / 2,
         "train/clean_acc": 0.5, "train/robust_acc": 0.25, "val/clean_acc": 0.1 * i}
        for i, lr in enumerate(rates)
    ]  # fmt: skip
    for row, value in zip(rows, (None, 0.25, 0.5, 0.5), strict=True):  # eval.every: some epochs have no validation
        if value is not None:
            row["val/robust_acc_pgd10"] = value
    other = [{"epoch": i + 1, "lr": 0.1, "train/loss": 1.0, "val/robust_acc_pgd20": 0.3} for i in range(2)]
    best = {"epoch": 3, "by": "robust_acc_pgd10", "value": 0.5}
    figure = curves_figure([subject("_one $x$", rows, best=best), subject("two", other, epsilon=8 / 255)])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["Training loss", "Weighted terms of the loss", "Clean accuracy", "Robust accuracy"]

    def curves(title):
        return [(list(line.get_xdata()), list(line.get_ydata())) for line in panels[title].lines]

    assert ([1, 2, 3, 4], [3.0, 2.0, 1.0, 0.0]) in curves("Training loss")
    assert ([1, 2], [1.0, 1.0]) in curves("Training loss")
    assert ([1, 2, 3, 4], [1.0, 0.5, 0.0, -0.5]) in curves("Weighted terms of the loss")
    assert ([1, 2, 3, 4], pytest.approx([0, 10, 20, 30])) in curves("Clean accuracy")
    assert ([2, 3, 4], [25, 50, 50]) in curves("Robust accuracy")
    assert ([1, 2], [30, 30]) in curves("Robust accuracy")
    assert ([3], [50]) in curves("Robust accuracy")
    assert ([3], pytest.approx([20])) in curves("Clean accuracy")
    for title in panels:
        assert [x for x, _ in curves(title) if len(set(x)) == 1 and len(x) == 2] == [[3.5, 3.5]], "the drop, no warm-up"
    keys = [text.get_text() for text in panels["Robust accuracy"].get_legend().get_texts()]
    assert keys[:2] == ["validation, PGD-10", "validation, PGD-20"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "_one $x$  (L∞ ε = 0.1)",
        "two  (L∞ ε = 8/255)",
    ]
    colours = [handle.get_color() for handle in figure.legends[0].legend_handles]
    assert len(set(colours)) == 2
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    assert pixels_of(buffer.getvalue()).shape[1] == 900


def test_best_epoch_is_the_checkpoints_own(run):
    def best():
        (found,) = read([run])
        return found.best, page.metric_rows([found])[-1][1]

    weights, meta = load_weights(run / "best.safetensors")
    value = meta["best"]["value"]
    expected = {"epoch": 1, "by": "robust_acc_pgd10", "value": value}
    assert meta["best"].items() >= expected.items()
    assert best() == (meta["best"], f"1 (chosen by {value:.2%} under PGD-10)")
    del meta["best"]  # a run from before the rule was kept
    Run(run).save_weights("best", weights, meta)
    assert best()[0] == expected
    (run / "best.safetensors").unlink()
    assert best() == (None, "none")


def test_loss_is_logarithmic_only_when_its_range_is_wide():
    flat = [{"epoch": 1, "lr": 0.1, "train/loss": 2.3}, {"epoch": 2, "lr": 0.1, "train/loss": 1.0}]
    wide = [{"epoch": 1, "lr": 0.1, "train/loss": 23.0}, {"epoch": 2, "lr": 0.1, "train/loss": 1.0}]
    scales = [curves_figure([subject("a", rows)]).axes[0].get_yscale() for rows in (flat, wide)]
    assert scales == ["linear", "log"]


def test_many_runs_differ_in_colour_or_marker():
    runs = [subject(str(i), [{"epoch": 1, "lr": 0.1, "train/loss": 1.0}]) for i in range(20)]
    handles = curves_figure(runs).legends[0].legend_handles
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]
    assert labels(paths) == ["a/run", "b/run", "other"]


def test_different_data_sets_are_refused(trained, run, tmp_path):
    weights, meta = load_weights(run / "last.safetensors")
    folder = Run(run)
    for change, words in (
        ({"dataset": "pics", "image_size": 16}, r"digits \(10 classes, 1x8x8\).*pics \(10 classes, 1x16x16\)"),
        ({"classes": list("abcdefghij")}, "other class names"),
    ):
        folder.save_weights("last", weights, {**meta, **change})
        with pytest.raises(UserError, match=words):
            report([trained[1], run], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def remove(*names):
    return lambda run: [(run / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "not a run folder"),
        (remove("metrics.jsonl"), "no metrics yet"),
        (lambda run: (run / "metrics.jsonl").write_text("damaged\n"), "damaged throughout"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1, "lr'), "no metrics yet"),
        (remove("config.yaml"), r"no config\.yaml"),
        (lambda run: (run / "eval.json").write_text("{}"), r"eval\.json is not an evaluation.*fastarat eval"),
        (lambda run: (run / "eval.json").write_text("{"), r"eval\.json is not an evaluation"),
        (lambda run: (run / "report").write_text("a file"), "cannot write to .*Choose another --out"),
    ],
)
def test_damaged_run(run, damage, words):
    damage(run)
    with pytest.raises(UserError, match=words):
        report([run], device="cpu")


def test_refused_arguments(run):
    with pytest.raises(UserError, match="num_images=0"):
        report([run], num_images=0)
    with pytest.raises(UserError, match="no run given"):
        report([])


@pytest.mark.usefixtures("quick")
def test_a_run_in_progress_is_reported(run, tmp_path):
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 2, "lr')
    (run / "card.txt").write_bytes(b"defense  \xff\xfe\n")
    assert (
        '<td>defense</td><td data-label="run">\ufffd'
        in report([run], tmp_path / "damaged", num_images=1, device="cpu").read_text()
    )
    (run / "card.txt").unlink()
    assert "no card.txt" in report([run], num_images=1, device="cpu").read_text()


@pytest.mark.usefixtures("quick")
def test_a_run_without_weights_is_shown_without_examples(trained, run, tmp_path):
    for name in ("last", "best"):
        (run / f"{name}.safetensors").unlink()
        (run / f"{name}.pt").unlink(missing_ok=True)
    alone = report([run], tmp_path / "alone", num_images=1, device="cpu").read_text()
    assert "run has no weights yet, so no examples." in alone
    assert not (tmp_path / "alone" / "examples.png").exists()
    both = report([trained[1], run], tmp_path / "both", num_images=1, device="cpu").read_text()
    assert both.count('class="example"') == 1


@pytest.mark.usefixtures("quick")
def test_a_comparisons_folder_stands_for_its_runs(trained, tmp_path):
    root = tmp_path / "compared"
    for name in ("b-seed0", "a-seed0"):
        shutil.copytree(trained[1], root / name)
    (root / "begun").mkdir()
    shutil.copy(trained[1] / "config.yaml", root / "begun")
    assert expanded([root, root / "a-seed0", str(root)]) == [root / "a-seed0", root / "b-seed0"]
    assert report([root], num_images=1, device="cpu") == root / "report" / "report.html"
    for name in ("b-seed0", "a-seed0"):
        (root / name / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="none of its 3 runs has finished an epoch"):
        report([root])


def evaluated(label, accuracy, count=100, **more):
    settings = {"attacks": {}, "norm": "linf", "epsilon": 0.1, **more}
    found = {"last": {"accuracy": accuracy, "settings": settings, "num_images": count}}
    return dataclasses.replace(
        subject(label, [{"epoch": 1, "wall_s": 90.0}, {"epoch": 2, "wall_s": 90.0}]), evaluations=found
    )


def test_leaderboard_says_what_the_json_says():
    runs = [
        evaluated("none", {"clean_acc": 0.99, "robust_acc_pgd20": 0.0, "robust_acc_aa": 0.0}),
        evaluated("fast", {"clean_acc": 0.8, "robust_acc_aa_fast": 0.4}, confirmed={"autoattack-fast": False}),
        evaluated("sure", {"clean_acc": 0.8, "robust_acc_aa_fast": 0.5}, confirmed={"autoattack-fast": True}),
        evaluated("pgd", {"clean_acc": 0.7, "robust_acc_pgd7": 0.45}, count=50),
        subject("new one", [{"epoch": 1}]),
    ]
    rows = {row[0].text: dict(zip(sections.HEAD, row, strict=True)) for row in sections.leaderboard(runs)}
    assert list(rows) == ["sure", "fast", "none", "pgd", "new one"]
    assert rows["sure"]["clean"] == ("80.00%", "71.1% to 86.7%")
    assert rows["sure"]["AutoAttack"] == ("50.00%", "AutoAttack-fast: 40.4% to 59.6%")
    assert rows["fast"]["AutoAttack"].note.startswith("AutoAttack-fast (unconfirmed): ")
    assert (rows["sure"]["Sum"].text, rows["sure"]["NRR"].text) == ("130.00", "61.54")  # 2 * 0.8 * 0.5 / 1.3
    assert (rows["none"]["Sum"].text, rows["none"]["NRR"].text) == ("99.00", "0.00")
    assert rows["sure"]["time"] == ("90.0 s an epoch", "3.0 min in all")
    assert rows["pgd"]["PGD"].note.startswith("PGD-7: ")
    assert rows["pgd"]["AutoAttack"] == rows["pgd"]["Sum"] == rows["sure"]["PGD"] == ("not measured", "")
    assert rows["pgd"]["images"] == ("50", "≠ other rows' number of images")
    assert rows["sure"]["images"] == ("100", "")
    assert rows["new one"]["run"].note == "not evaluated yet: fastarat eval 'new one'"


def test_gap_between_best_and_last_epoch():
    rows = [{"epoch": i + 1, "val/robust_acc_pgd10": value} for i, value in enumerate((0.2, 0.5, 0.375))]
    best = {"epoch": 2, "by": "robust_acc_pgd10", "value": 0.5}
    ((_, at_best, at_last, gap),) = sections.gaps([subject("a", rows, best=best)])
    assert (at_best, at_last) == (("50.00%", "epoch 2, the best checkpoint"), ("37.50%", "epoch 3"))
    assert gap.text == "+12.50 points"
    assert sections.gaps([subject("a", [{"epoch": 1}])])[0][1] == sections.MISSING


def tips(charts):
    return [html.unescape(tip) for chart in charts for tip in re.findall(r'data-tip="([^"]*)"', chart.inline)]


def test_points_of_the_charts_say_what_the_metrics_say():
    rows = [{"epoch": i + 1, "wall_s": 60.0, "lr": 0.1, "train/loss": 2.0 - i, "train/ce": 1.25, "train/kl": 0.5,
             "val/clean_acc": 0.5 + i / 8, "diag/grad_sim": -0.25 * i, "diag/rep_distance/layer4": 7.0} for i in range(2)]  # fmt: skip
    runs = [subject("<a> $x$", rows)]
    told = tips(sections.curves(runs, by_time=False))
    for words in (
        "loss",
        ", ce (weighted): 1.25 at epoch 2",
        "<a> $x$, validation: 62.50% at epoch 2",
        "0.1 at epoch 1",
    ):
        assert any(words in tip for tip in told) or words == "loss", words
    assert "<a> $x$: 2 at epoch 1" in told
    assert any(tip.endswith("62.50% at 2 minutes of training") for tip in tips(sections.curves(runs, by_time=True)))
    assert tips(sections.diagnostics(runs)) == ["<a> $x$: -0 at epoch 1", "<a> $x$: -0.25 at epoch 2"]


def test_points_that_tell_lie_where_they_are_drawn():
    rows = [
        {"epoch": i + 1, "wall_s": 60.0, "lr": 0.1, "train/loss": 50.0 / (1 + i) ** 3, "val/clean_acc": 0.5 + i / 8}
        for i in range(4)
    ]
    for chart in sections.curves([subject("a", rows)], by_time=False):
        drawn = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--c0\)', chart.inline)
        drawn = {(round(float(x)), round(float(y))) for x, y in drawn}
        told = {
            (round(float(x)), round(float(y))) for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', chart.inline)
        }
        assert len(told) == 4
        assert all(min(abs(x - a) + abs(y - b) for a, b in drawn) <= 2 for x, y in told), chart.name


def test_classes_and_strength_say_what_the_json_says():
    run = evaluated("a", {"clean_acc": 0.5})
    run.evaluations["last"] |= {
        "class_counts": [4, 8],
        "per_class": {"clean_acc": [4, 2], "robust_acc_pgd20": [1, 0]},
        "confusion": {"clean_acc": [[4, 0], [6, 2]], "robust_acc_pgd20": [[1, 3], [8, 0]]},
        "curves": {"epsilon": {"values": [0, 0.2], "accuracy": [0.5, 0.125]}, "steps": {"values": [1, 50], "accuracy": [0.4, 0.3]}},
    }  # fmt: skip
    assert tips(sections.strength([run])) == [
        "a: 50.00% at 0 epsilon", "a: 12.50% at 51 epsilon", "a: 40.00% at 1 steps of PGD", "a: 30.00% at 50 steps of PGD",
    ]  # fmt: skip
    told = tips(sections.by_class([run], ["$cat$", "dog"]))
    assert told[:4] == ["$cat$, clean: 100.00%", "dog, clean: 25.00%", "$cat$, robust: 25.00%", "dog, robust: 0.00%"]
    assert told[4:] == [
        "$cat$ taken for $cat$: 1 (25.0%)", "$cat$ taken for dog: 3 (75.0%)", "dog taken for $cat$: 8 (100.0%)",
        "dog taken for dog: 0 (0.0%)",
    ]  # fmt: skip
    assert sections.without([run, subject("b")], "curves")[0].label == "b"


@pytest.mark.parametrize(
    ("part", "value"),
    [("per_class", {"clean_acc": [1]}), ("confusion", [1]), ("confusion", {"clean_acc": [[1, 2], ["x"]]}), ("curves", {"epsilon": 3})],
)  # fmt: skip
def test_damaged_parts_of_an_evaluation_are_named(part, value):
    run = evaluated("a", {"clean_acc": 0.5})
    run.evaluations["last"] |= {"class_counts": [4, 8], part: value}
    with pytest.raises(UserError, match=f"`{part}` of its evaluation is damaged.*fastarat eval a measures it anew"):
        (sections.strength([run]), sections.by_class([run], ["cat", "dog"]))


def test_many_classes_show_the_least_robust():
    run = evaluated("a", {"clean_acc": 0.5})
    run.evaluations["last"] |= {
        "class_counts": [100] * 100,
        "per_class": {"clean_acc": [90] * 100, "robust_acc_aa": list(range(100))},
    }
    told = tips(sections.by_class([run], [f"c{i}" for i in range(100)]))
    assert [tip for tip in told if "robust" in tip] == [f"c{i}, robust: {i}.00%" for i in range(20)]


def test_facts_that_differ_between_cards_are_marked():
    runs = [
        dataclasses.replace(subject("a"), card="seed   0\nmodel  net"),
        dataclasses.replace(subject("b"), card="seed   1\nmodel  net\nSWA    on"),
    ]
    assert sections.cards(runs) == [
        ("seed", True, ["0", "1"]),
        ("model", False, ["net", "net"]),
        ("SWA", True, ["", "on"]),
    ]
