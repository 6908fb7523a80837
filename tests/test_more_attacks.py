"""CW-PGD, transfer, the worst case, curves, counts by class, masking alarms and common corruptions."""

import json

import numpy as np
import pytest
import torch
from small import shorten_autoattack, small_config
from torch import nn

import fastarat
from fastarat.cli import main
from fastarat.config import EvalConfig
from fastarat.data import load_dataset
from fastarat.defenses.at import AT
from fastarat.defenses.gairat import GAIRAT
from fastarat.errors import UserError
from fastarat.evaluation import check_record, evaluate, parse_attacks
from fastarat.evaluation.alarms import Probe, doubts
from fastarat.evaluation.corruptions import KINDS, corrupted
from fastarat.evaluation.crafted import CURVE_STEPS
from fastarat.nets.batchnorm import SplitBatchNorm2d
from fastarat.runs import load_network
from fastarat.specs import Attack

LIST = "clean,pgd-20,cw-20,cw-5-2,transfer,square,worst"


def network(seed=0, bn=nn.BatchNorm2d, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), bn(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, classes))


@pytest.fixture(scope="module")
def some():
    """Images that a network classifies as it is told, the more securely the farther in front."""
    g = torch.Generator().manual_seed(1)
    images = torch.rand(60, 3, 8, 8, generator=g)
    model = network().eval()
    return model, images, model(images).argmax(1)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("l2", 0.2)])
def test_every_attack_in_both_norms(some, norm, epsilon, monkeypatch):
    model, images, labels = some
    shorten_autoattack(monkeypatch, square=50)
    options = {"epsilon": epsilon, "norm": norm, "batch_size": 25, "source": network(seed=1), "progress": False}
    result = evaluate(model, (images, labels), LIST, **options)
    accuracy = result.accuracy
    assert list(accuracy) == [e.key for e in parse_attacks(LIST)]
    assert accuracy["robust_acc_worst"] <= min(accuracy.values())
    assert accuracy["robust_acc_cw20"] < 1
    assert accuracy["robust_acc_transfer"] > accuracy["robust_acc_pgd20"], "another network's images are weaker"
    for name in ("cw-20", "cw-5-2", "transfer", "square"):
        assert 0 < result.max_perturbation[name] <= epsilon * (1 + 1e-4) + 1e-6
    for key, value in accuracy.items():
        assert sum(result.per_class[key]) == round(value * 60)
    assert result.class_counts == torch.bincount(labels, minlength=4).tolist()
    assert {*result.confusion} == {k for k in accuracy if "square" not in k and "worst" not in k}
    for key, matrix in result.confusion.items():
        assert [sum(row) for row in matrix] == result.class_counts
        assert [matrix[k][k] for k in range(4)] == result.per_class[key]
    check_record(json.loads(result.to_json()))


def test_cw_is_exact_on_a_linear_network():
    """Of two classes, margin and cross-entropy have one direction: the closed form of PGD is CW-PGD's, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    images = 0.3 + 0.4 * torch.rand(50, 3, 8, 8)
    logits = model(images).detach()
    labels = logits.argmax(1)
    weight = model[1].weight.detach()
    epsilon = 0.02
    standing = (logits[:, 0] - logits[:, 1]).abs() > epsilon * (weight[0] - weight[1]).abs().sum()
    result = evaluate(model, (images, labels), "cw-20", epsilon=epsilon, progress=False)
    assert 0 < result.accuracy["robust_acc_cw20"] < 1
    assert result.accuracy["robust_acc_cw20"] == pytest.approx(float(standing.float().mean()))


def test_the_worst_case_is_taken_image_by_image(some):
    model, images, labels = some
    result = evaluate(model, (images, labels), "worst,pgd-1,cw-1", epsilon=0.03, progress=False)
    alone = [evaluate(model, (images, labels), a, epsilon=0.03, progress=False) for a in ("pgd-1", "cw-1")]
    left = min(next(iter(a.accuracy.values())) for a in alone)
    assert result.accuracy["robust_acc_worst"] <= left
    with pytest.raises(UserError, match="name some"):
        parse_attacks("clean,worst")


def test_the_source_of_a_transfer_is_recorded_and_must_fit(some):
    model, images, labels = some
    itself = evaluate(model, (images, labels), "pgd-20,transfer", epsilon=0.02, source=model, progress=False)
    assert itself.accuracy["robust_acc_transfer"] == itself.accuracy["robust_acc_pgd20"]
    assert itself.settings["from"] == itself.settings["weights_sha256"]
    with pytest.raises(UserError, match="has 7 classes, this one 4"):
        evaluate(model, (images, labels), "transfer", source=network(classes=7), progress=False)
    for attack, source in (("transfer", None), ("pgd-2", model)):
        with pytest.raises(UserError, match="go together"):
            evaluate(model, (images, labels), attack, source=source)


def test_curves_pass_through_the_accuracies_of_the_list(some):
    model, images, labels = some
    options = {"epsilon": 0.02, "batch_size": 25, "progress": False}
    result = evaluate(model, (images, labels), "clean,pgd-5,pgd-20", curves=True, **options)
    epsilon, steps = result.curves["epsilon"], result.curves["steps"]
    assert epsilon["values"] == [0.02 * i / 4 for i in range(9)]
    assert epsilon["accuracy"][0] == result.accuracy["clean_acc"]
    assert epsilon["accuracy"][4] == result.accuracy["robust_acc_pgd20"]
    assert epsilon["accuracy"][8] < epsilon["accuracy"][4]
    assert steps["values"] == list(CURVE_STEPS)
    at = dict(zip(steps["values"], steps["accuracy"], strict=True))
    assert (at[5], at[20]) == (result.accuracy["robust_acc_pgd5"], result.accuracy["robust_acc_pgd20"])
    assert not evaluate(model, (images, labels), "clean", **options).curves
    check_record(json.loads(result.to_json()))
    record = json.loads(result.to_json())
    record["curves"]["steps"]["accuracy"][0] = "x"
    with pytest.raises(TypeError):
        check_record(record)


def alarms(attack, values, **options):
    entries = parse_attacks(attack)
    accuracy = {e.key: v for e, v in zip(entries, values, strict=True)}
    return doubts(entries, accuracy, {}, options.pop("clean", 0.9), num_images=1000, **options)


@pytest.mark.parametrize(
    ("attack", "values", "said"),
    [
        (
            "pgd-10,pgd-50",
            (0.5, 0.55),
            "5.0 points higher under pgd-50 (55.00%) than under pgd-10 (50.00%): more steps",
        ),
        ("pgd-1,pgd-20", (0.4, 0.5), "single-step PGD beats it"),
        ("pgd-20,cw-20", (0.6, 0.45), "cw-20, on the margin, is 15.0 points below pgd-20"),
        ("pgd-20,transfer", (0.6, 0.5), "leave 50.00%, 10.0 points below pgd-20"),
        ("pgd-20,autoattack", (0.6, 0.5), "AutoAttack is 10.0 points below pgd-20"),
        ("pgd-20", (0.95,), "above clean accuracy"),
    ],
)
def test_alarms_say_their_numbers(attack, values, said):
    (note,) = alarms(attack, values)
    assert said in note


def test_alarms_of_probe_and_curve_and_none_without_reason():
    fallen = Probe("pgd-20", 100, 0.5, 10, 20)
    notes = alarms("pgd-20", (0.5,), probe=fallen)
    assert "FGSM broke 10 of 100 images that withstood pgd-20, about 5.0 points" in notes[0]
    assert "broke 20 of 100 images" in notes[1]
    curve = {"steps": {"values": [1, 10], "accuracy": [0.4, 0.5]}}
    assert "rises by 10.0 points from 1 PGD steps (40.00%) to 10" in alarms("pgd-20", (0.5,), curves=curve)[0]
    assert not alarms("pgd-1,pgd-10,pgd-20,cw-20,transfer,autoattack", (0.6, 0.52, 0.5, 0.49, 0.7, 0.485))
    assert not alarms("pgd-20", (0.5,), probe=Probe("pgd-20", 100, 0.5, 1, 3))


def test_tiny_gradients_are_noted(some):
    model, images, labels = some
    sure = nn.Linear(4, 4)  # of class 0, by far more than any other logit can say
    with torch.no_grad():
        sure.weight.copy_(torch.eye(4))
        sure.bias.copy_(torch.tensor([40.0, 0, 0, 0]))
    steep, labels = nn.Sequential(model, sure), torch.zeros_like(labels)
    result = evaluate(steep, (images, labels), "pgd-2", epsilon=0.02, progress=False)
    assert any("tiny input gradient (below 1e-10) on" in text for text in result.warnings)


def trained_on_digits(folder, defense):
    config = small_config(
        folder, defense=defense, epochs=DIGITS["epochs"], limit_train=DIGITS["limit_train"], batch_size=64,
        attack=Attack(epsilon=0.1, num_steps=5), eval=EvalConfig(val_images=40, num_steps=1, every=DIGITS["epochs"]),
    )  # fmt: skip
    return load_network(fastarat.train(config, progress=False).run)[0]


DIGITS = {"epochs": 8, "limit_train": 600}


def test_gairat_raises_an_alarm_and_at_none(tmp_path):
    test = load_dataset("digits", data_dir=tmp_path).test
    for defense, masks in ((GAIRAT(begin_epoch=1, lam=-3.0), True), (AT(), False)):
        model = trained_on_digits(tmp_path / defense.name, defense)
        found = evaluate(model, test, "clean,pgd-20", epsilon=0.1, progress=False).warnings
        assert bool(found) == masks, (defense.name, found)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 1, 8, 8), (2, 1, 28, 28), (2, 3, 40, 24)])
def test_corruptions_repeat_and_differ(shape):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    for kind in KINDS:
        for severity in (1, 5):
            made = corrupted(images, kind, severity)
            assert made.shape == images.shape
            assert made.dtype == torch.float32
            assert 0 <= made.min() <= made.max() <= 1
            assert torch.equal(made, corrupted(images, kind, severity))
            assert torch.equal(made[1:], corrupted(images[1:], kind, severity, first=1)), "by image, not by batch"
            assert (made - images).abs().max() > 1 / 255
    assert not torch.equal(corrupted(images, "frost", 1), corrupted(images, "frost", 1, seed=1))
    assert torch.equal(images, before)


def test_noise_and_contrast_are_of_the_published_strength():
    grey = torch.full((4, 3, 32, 32), 0.5)
    for severity, scale in enumerate((0.04, 0.06, 0.08, 0.09, 0.1), start=1):
        assert corrupted(grey, "gaussian_noise", severity).std().item() == pytest.approx(scale, rel=0.05)
    half = torch.cat([torch.zeros(1, 3, 32, 16), torch.ones(1, 3, 32, 16)], 3)
    for severity, left in enumerate((0.75, 0.5, 0.4, 0.3, 0.15), start=1):
        made = corrupted(half, "contrast", severity)
        assert (made.max() - made.min()).item() == pytest.approx(left, abs=2 / 255)
    bright = corrupted(grey, "brightness", 3)
    assert bright.mean().item() == pytest.approx(0.65, abs=1 / 255)
    share = (corrupted(grey, "impulse_noise", 5) != corrupted(grey, "contrast", 1)).float().mean().item()
    assert share == pytest.approx(0.07, abs=0.01)


def test_corruptions_are_measured_in_every_branch(some):
    _, images, labels = some
    model = network(bn=SplitBatchNorm2d)
    with torch.no_grad():
        model[1].clean.weight.normal_()
    result = evaluate(model, (images[:12], labels[:12]), "clean,corruptions", progress=False)
    assert {*result.corruptions} == {*KINDS}
    values = [value for five in result.corruptions.values() for value in five]
    assert result.accuracy["corruption_acc"] == pytest.approx(sum(values) / 75)
    assert {*result.corruptions_by_branch} == {"clean"}
    assert result.corruptions_by_branch["clean"] != result.corruptions
    assert "branch clean" in result.table()
    check_record(json.loads(result.to_json()))
    with pytest.raises(UserError, match="leave corruptions out"):
        evaluate(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), (torch.rand(4, 2, 8, 8), labels[:4]), "corruptions")


def test_prepared_corruptions_are_read_and_checked(some, tmp_path):
    model, images, labels = some
    folder, pixels = tmp_path / "C", np.uint8(images.permute(0, 2, 3, 1).numpy() * 255)
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5).astype(np.uint8))
    with pytest.raises(UserError, match=r"lacks gaussian_noise.npy, shot"):
        evaluate(model, (images, labels), "corruptions", corruptions_dir=folder)
    for kind in KINDS:  # nothing happens in severity 1, everything is black in the others
        np.save(folder / f"{kind}.npy", np.concatenate([pixels, np.tile(np.zeros_like(pixels), (4, 1, 1, 1))]))
    options = {"corruptions_dir": folder, "progress": False}
    result = evaluate(model, (images, labels), "clean,corruptions", **options)
    # Rounding to 255 steps may turn an image on the edge.
    assert result.corruptions["fog"][0] == pytest.approx(1, abs=0.05)
    black = float((labels == model(torch.zeros(1, 3, 8, 8)).argmax(1)).float().mean())
    assert result.corruptions["fog"][1:] == pytest.approx([black] * 4)
    with pytest.raises(UserError, match="another test set"):
        evaluate(model, (images, (labels + 1) % 4), "corruptions", **options)
    np.save(folder / "fog.npy", pixels)
    with pytest.raises(UserError, match=r"fog.npy is uint8 \[60, 8, 8, 3\]: expected uint8 \[300, 8, 8, 3\]"):
        evaluate(model, (images, labels), "corruptions", **options)
    (folder / "fog.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(model, (images, labels), "corruptions", **options)
    with pytest.raises(UserError, match="name that"):
        evaluate(model, (images, labels), "clean", **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fastarat.train(small_config(tmp_path_factory.mktemp("runs") / "run", epochs=1), progress=False).run


def mistake(argv, capsys):
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_eval_says_what_is_unusual_and_records_it(run, tmp_path, capsys):
    out = tmp_path / "x.json"
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("epochs: 1\n", "epochs: 9\n"))
    argv = ["eval", run, "--from", run, "--attack", "pgd-2", "--limit", "20", "--epsilon", "0.2", "--out", out]
    assert main([str(a) for a in argv]) == 0
    config.write_text(text)
    told = capsys.readouterr().out
    assert "note: the run has 1 of 9 epochs" in told
    assert "note: evaluated at linf epsilon 51/255, trained at linf epsilon 0.1" in told
    saved = json.loads(out.read_text())
    assert (saved["settings"]["epsilon"], saved["settings"]["trained_epsilon"]) == (0.2, 0.1)
    assert saved["settings"]["from_run"] == str(run)
    assert "robust_acc_transfer" in saved["accuracy"]
    assert "needs --from RUN" in mistake(["eval", run, "--attack", "transfer"], capsys)
    assert "name that, too" in mistake(["eval", run, "--corruptions-dir", tmp_path], capsys)


def test_a_file_of_something_else_is_not_overwritten(run, tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = ["eval", run, "--attack", "clean", "--limit", "20", "--out", out]
    assert main([str(a) for a in argv]) == 0
    assert main([str(a) for a in argv]) == 0, "its own may be replaced"
    record = json.loads(out.read_text())
    other, older = {**record["settings"], "weights_sha256": "0" * 64}, {**record["settings"]}
    del older["weights_sha256"]
    for text, said in (
        ("my notes", "is no evaluation that can be read"),
        (json.dumps({**record, "settings": other}), "is an evaluation of other weights"),
        (json.dumps({**record, "settings": older}), "is of an earlier version"),
    ):
        out.write_text(text)
        assert said in (error := mistake(argv, capsys))
        assert "nothing is overwritten" in error
        assert out.read_text() == text
    assert main([str(a) for a in [*argv, "--overwrite"]]) == 0
