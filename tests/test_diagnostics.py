"""What a training measures of itself: its numbers by hand, and that looking changes nothing."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from small import assert_equal, batch, metrics, small_config, small_model, step_of, trained, weights
from torch import nn

import fastarat
from fastarat import diagnostics
from fastarat.diagnostics import Diagnostics, branch_distances, gradient_agreement, in_short, representation_distances
from fastarat.nets.batchnorm import branch, split_batchnorm


def without_time(rows: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in ("wall_s", "images_per_s", "crc32") and not k.startswith("diag/")}
        for row in rows
    ]


def test_gradient_agreement_by_hand():
    a, b = torch.tensor([1.0, 2.0, 0.0], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    # Gradients: classification (2, -1, 1 | 4), regularisation (1, 1, 0 | -2).
    terms = {
        "ce": 2 * a[0] - a[1] + a[2] + 3 * b.sum(), "ce_clean": b.sum(), "kl": a[0] + a[1] - 2 * b.sum()
    }  # fmt: skip
    found = gradient_agreement(terms, ("kl",), [a, b])
    dot, first, second = 2 - 1 + 0 - 8, 4 + 1 + 1 + 16, 1 + 1 + 4
    assert found.tolist() == pytest.approx(
        [dot / math.sqrt(first * second), 2 / 4, (2 - 1) / math.sqrt(6 * 2), -1.0], abs=1e-12
    )
    assert a.grad is None
    assert b.grad is None


def test_gradients_of_a_loss_without_two_halves_are_not_compared():
    w = torch.ones(2, requires_grad=True)
    assert gradient_agreement({"ce": w.sum()}, ("kl",), [w]) is None
    assert gradient_agreement({"kl": w.sum()}, ("kl",), [w]) is None
    # A weight that one half does not reach, and a gradient of zero, are 0 and not NaN.
    other = torch.ones(3, requires_grad=True)
    assert gradient_agreement({"ce": w.sum(), "kl": 0 * w.sum()}, ("kl",), [w, other]).tolist() == [0, 0, 0, 0]


def plain_gradients(model, companions, defense, images, adv, labels):
    """Grad-sim of AR-AT's naive loss, written down once more: two forwards, torch.autograd.grad, no engine."""
    model.train()
    logits, features = [], []
    for x, name in ((images, "clean"), (adv, "adv")):
        kept = []
        hook = next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(
            lambda m, args, kept=kept: kept.append(args[0])
        )
        with branch(model, name, updates=()):
            logits.append(model(x))
        hook.remove()
        features.append(kept[0])
    classify = sum(nn.functional.cross_entropy(z, labels) for z in logits)
    z, z_adv = features
    apart = 1 - nn.functional.cosine_similarity(z_adv, z.detach() if defense.align == "x->y" else z, dim=1).mean()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    first, second = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)])
        for loss in (classify, 30 * apart)
    )
    return float(nn.functional.cosine_similarity(first, second, dim=0)), float((first * second < 0).float().mean())


@pytest.mark.parametrize("align", ["x->y", "x<->y"])
def test_the_similarity_measured_is_that_of_the_plain_formula(align):
    defense = fastarat.ARAT(
        layers=("penultimate",), predictor_adv=False, balance="fixed", center="clean", align=align, gamma=30.0
    )
    step = step_of(defense)
    images, labels = batch(16)
    seen = Diagnostics(step, [], 4, 1, 64, every=1)
    with step.probe(images, labels) as terms:
        found = gradient_agreement(terms, defense.regularizers, list(seen.weights.values()))
    # The same attack: the generator was put back.
    adv = step.attack(images, labels).images
    wanted = plain_gradients(step.model, step.companions, defense, images, adv, labels)
    assert (float(found[0]), float(found[1])) == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("options", [{}, {"capture": "fake"}, {"precision": "bf16"}], ids=str)
def test_a_probe_moves_nothing(options):
    def run(probing: bool) -> dict[str, torch.Tensor]:
        step = step_of(fastarat.ARAT(), **options)
        for seed in range(3):
            images, labels = batch(8, seed)
            if probing:
                with step.probe(images, labels) as terms:
                    torch.stack(list(terms.values())).sum().backward()
                step.optimizer.zero_grad()
            step(images, labels)
        return {**step.model.state_dict(), **{f"c.{k}": v for k, v in step.companions.state_dict().items()}}

    assert_equal(run(True), run(False))


def test_distances_of_branches_by_hand():
    model = split_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    norm = model[1]
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0]))
    norm.branch_set("clean").running_mean.copy_(torch.tensor([0.0, 3.0]))
    norm.branch_set("clean").running_var.copy_(torch.tensor([3.0, 4.0]))
    mean = (1 / math.sqrt(2 + 1e-5) + 3 / math.sqrt(4 + 1e-5)) / 2
    std = (abs(math.log((1 + 1e-5) / (3 + 1e-5))) / 2 + 0) / 2
    assert branch_distances(model)["1"] == pytest.approx((mean, std))
    assert branch_distances(small_model()) == {}


def test_stability_is_the_variance_of_the_running_means_over_the_epoch():
    step = step_of(fastarat.ARAT())
    seen = Diagnostics(step, [], 3, 2, 64)
    kept = []
    for index in range(3):
        images, labels = batch(8, index)
        with seen.around(1, index, _Batch(images, labels)):
            step(images, labels)
        kept.append([bn.running_mean.double().clone() for _, bn in seen.sets["adv"]])
    row = seen.row(1)
    by_layer = [torch.stack(layer).var(0, unbiased=False).mean() for layer in zip(*kept, strict=True)]
    assert row["diag/bn_stability_adv"] == pytest.approx(float(torch.stack(by_layer).mean()), rel=1e-9)
    name = seen.sets["adv"][0][0]
    assert row[f"diag/bn_stability_adv/{name}"] == pytest.approx(float(by_layer[0]), rel=1e-9)
    assert "diag/bn_stability_shared" not in row
    assert row["diag/bn_stability_clean"] > 0


class _Batch:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels


def test_representations_are_compared_in_eval_mode_through_the_adversarial_branch():
    model = split_batchnorm(small_model())
    for m in model.modules():
        if hasattr(m, "branches"):
            m.branch_set("clean").running_mean.fill_(7.0)  # what would change every feature, were it looked at
    images, labels = batch(6)
    images = images.contiguous()
    model.train()
    found = representation_distances(model, images, labels, ("penultimate",), epsilon=0.1, norm="linf")
    assert all(m.training for m in model.modules())
    points = fastarat.evaluation.adversarial_examples(model, images, labels, epsilon=0.1)
    kept = []
    hook = next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(
        lambda m, args: kept.append(args[0])
    )
    model.eval()
    with torch.no_grad(), branch(model, "adv"):
        model(images), model(points)
    hook.remove()
    assert found["penultimate"] == pytest.approx(float((kept[1] - kept[0]).norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("defense", ["ar-at", "trades", "at", "standard"])
def test_a_run_that_looks_at_itself_is_the_run_that_does_not(tmp_path, monkeypatch, defense):
    monkeypatch.setattr(diagnostics, "EVERY", 2)
    options = {"defense": defense, "epochs": 2, "swa": True, "ema": 0.9}
    plain, seen = (trained(tmp_path / str(on), diagnostics=on, **options) for on in (False, True))
    assert_equal(weights(seen), weights(plain))
    assert without_time(metrics(seen)) == without_time(metrics(plain))
    rows = metrics(seen)
    short = in_short(rows)
    has_two = defense in ("ar-at", "trades")
    assert ("grad_sim" in short) == has_two
    assert not has_two or -1 <= short["grad_sim"] <= 1
    assert ("bn_distance_mean" in short) == (defense == "ar-at")
    assert short["rep_distance"] > 0
    assert not any("diag/" in key for row in metrics(plain) for key in row)
    assert "diagnostics" in (seen / "card.txt").read_text()


def test_a_run_ended_within_an_epoch_measures_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "EVERY", 2)
    whole = trained(tmp_path / "whole", diagnostics=True, epochs=2)
    taken = fastarat.TrainStep.__call__
    calls = [0]

    def counted(self, images, labels):
        calls[0] += 1
        if calls[0] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(self, images, labels)

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(fastarat.TrainStep, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", diagnostics=True, epochs=2)
    fastarat.train(resume=tmp_path / "cut", progress=False)
    drop = ("wall_s", "images_per_s", "crc32")
    first, second = (
        [{k: v for k, v in r.items() if k not in drop} for r in metrics(p)] for p in (whole, tmp_path / "cut")
    )
    assert first == second
    assert any("diag/grad_sim" in row for row in first)


def test_it_may_be_switched_on_when_a_run_is_resumed(tmp_path):
    run = trained(tmp_path / "run", epochs=1)
    fastarat.train(resume=run, overrides={"epochs": 2, "diagnostics": True}, progress=False)
    rows = metrics(run)
    assert "diag/bn_stability_adv" not in rows[0]
    assert "diag/bn_stability_adv" in rows[1]


def test_the_mean_over_a_run_weighs_epochs_by_their_measurements():
    rows = [
        {"epoch": 1, "diag/grad_sim": 0.5, "diag/grad_conflict": 0.4, "diag/grad_samples": 1, "diag/rep_distance": 3.0},
        {"epoch": 2, "diag/rep_distance": 2.0, "diag/rep_distance/x": 1.0},
        {"epoch": 3, "diag/grad_sim": 0.2, "diag/grad_conflict": 0.1, "diag/grad_samples": 2.0},
    ]
    assert in_short(rows) == pytest.approx({"grad_sim": 0.3, "grad_conflict": 0.2, "rep_distance": 2.0})
    assert in_short([{"epoch": 1}]) == {}


def test_what_is_measured_is_cheap_by_its_own_arithmetic():
    step = step_of(fastarat.ARAT(), num_steps=10)
    val = fastarat.data.load_dataset("digits").val
    seen = Diagnostics(step, val, 391, 100, 50_000)
    assert len(seen.images[1]) == min(128, len(val))
    assert seen.period == 1
    # Forward and backward passes of one batch: the step's 26, a probe's 30 of which every fortieth step has one.
    probe = 30 / (26 * seen.every)
    compared = len(seen.images[1]) * 40 / (50_000 * 26)
    assert probe + compared < 0.05
    few = Diagnostics(step, val, 2, 100, 100)
    assert len(few.images[1]) * 40 / few.period <= 0.0101 * 100 * 26


def test_config_says_so(tmp_path):
    config = small_config(tmp_path / "run", diagnostics=True)
    assert json.loads(json.dumps(fastarat.config.to_dict(config)))["diagnostics"] is True
