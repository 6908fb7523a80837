"""AutoAttack's quick searches: only what float32 confirms counts, and what they miss is found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import shorten_autoattack

import fastarat
from fastarat.data import load_dataset
from fastarat.evaluation import autoattack, collect, evaluate
from fastarat.evaluation.autoattack import AutoAttackRun
from fastarat.evaluation.search import SEARCH, fast_members, quick_forward
from fastarat.evaluation.task import STANDARD, Task
from fastarat.values import checked_budget

EPSILON = 0.1


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten every attack of AutoAttack."""
    shorten_autoattack(monkeypatch, apgd=8, fab=2, square=30)


@pytest.fixture(scope="module")
def digits():
    """A network of convolutions and BatchNorm, partly robust, and 40 digits."""
    data = load_dataset("digits")
    torch.manual_seed(0)
    step = fastarat.TrainStep(
        fastarat.build_model("resnet-small", num_classes=10, in_channels=1, image_size=8),
        fastarat.AT(),
        torch.empty(2, 1, 8, 8),
        epsilon=EPSILON,
        num_steps=2,
    )
    images, labels = collect(data.train, limit=448)
    for epoch in range(3):
        step.set_lr(0.05)
        for rows in torch.randperm(448, generator=torch.Generator().manual_seed(epoch)).split(64):
            step(images[rows], labels[rows])
    return step.model, collect(data.test, limit=24)


def run_of(digits, members, **options):
    model, (images, labels) = digits
    device = torch.device("cpu")
    task = Task(model, images, labels, checked_budget(EPSILON), 64, 0, "adv", False, device, False, **options)
    with task.lent(), torch.no_grad():
        correct = task.forward(images).argmax(1) == labels
        run = AutoAttackRun(task, "autoattack-fast", members, 10, correct)
        run.play()
    return run


def test_the_fast_robust_set_is_autoattacks_image_by_image(digits):
    plain = run_of(digits, STANDARD).robust
    found = run_of(digits, fast_members(STANDARD, confirm=True))
    assert 0.1 < plain.float().mean() < 0.95
    assert torch.equal(plain, found.robust)
    assert [*found.done] == ["search apgd-ce", "search apgd-t", *STANDARD]
    assert fast_members(STANDARD, confirm=False) == tuple(SEARCH + m for m in STANDARD)


def test_the_quick_network_folds_and_is_near_the_network(digits):
    model, (images, labels) = digits
    task = Task(model, images, labels, checked_budget(EPSILON), 64, 0, "adv", False, torch.device("cpu"), False)
    with task.lent(), torch.no_grad():
        exact, quick = task.forward(images), quick_forward(task)(images)
    assert quick.dtype == torch.float32
    assert (quick - exact).norm() < 0.05 * exact.norm()


def wrong_about(everything):
    """A quick network that is wrong about all images, or that nothing can fool."""

    def made(task):
        def forward(images):
            labels = torch.full((len(images),), 11)
            if not everything:
                labels = task.forward(task.images).argmax(1)[: len(images)]
            # Depends on the images, as gradients must exist, and too little to change the class.
            return torch.eye(12)[labels][:, :12] * 100 + 1e-6 * images.flatten(1).sum(1, keepdim=True)

        return forward

    return made


def test_examples_that_float32_denies_do_not_count_and_are_searched_for_in_float32(digits, monkeypatch):
    monkeypatch.setattr(autoattack, "quick_forward", wrong_about(True))
    # Far below what changes any class, so that whoever counts the claims has no image left.
    model, data = digits
    result = evaluate(model, data, "clean,autoattack-fast", epsilon=1e-5, confirm=False, progress=False)
    assert result.accuracy["robust_acc_aa_fast"] == result.accuracy["clean_acc"] > 0.5
    searched = run_of(digits, (SEARCH + "apgd-ce",)).robust
    assert torch.equal(searched, run_of(digits, ("apgd-ce",)).robust)
    assert searched.float().mean() < result.accuracy["clean_acc"]


def test_the_confirmation_finds_what_a_crippled_search_missed(digits, monkeypatch):
    monkeypatch.setattr(autoattack, "_search", lambda task, fast, exact, quick, member, x, y: x)
    model, data = digits
    settings = {"epsilon": EPSILON, "progress": False}
    missed = evaluate(model, data, "clean,autoattack-fast", confirm=False, **settings)
    assert missed.accuracy["robust_acc_aa_fast"] == missed.accuracy["clean_acc"]
    found = evaluate(model, data, "autoattack,autoattack-fast", **settings)
    assert found.accuracy["robust_acc_aa_fast"] == found.accuracy["robust_acc_aa"] < missed.accuracy["clean_acc"]


def test_what_is_unconfirmed_says_so_everywhere(digits):
    model, data = digits
    unsure = evaluate(model, data, "autoattack-fast", epsilon=EPSILON, confirm=False, progress=False)
    assert "autoattack-fast (unconfirmed)" in unsure.table()
    assert "unconfirmed" in " ".join(unsure.warnings)
    assert json.loads(unsure.to_json())["settings"]["confirmed"] == {"autoattack-fast": False}
    sure = evaluate(model, data, "autoattack-fast", epsilon=EPSILON, progress=False)
    assert sure.settings["confirmed"] == {"autoattack-fast": True}
    assert "unconfirmed" not in sure.table()
    assert sure.accuracy["robust_acc_aa_fast"] <= unsure.accuracy["robust_acc_aa_fast"]


def test_an_interrupted_search_goes_on_and_confirming_is_another_run(digits, tmp_path, monkeypatch):
    model, (images, labels) = digits
    data, call = (images[:10], labels[:10]), {"epsilon": EPSILON, "progress": False}
    whole = evaluate(model, data, "autoattack-fast", **call)
    original, calls = autoattack._perturb, []

    def stop(ensemble, member, x, y):
        calls.append(member)
        if member == "fab-t":
            raise KeyboardInterrupt
        return original(ensemble, member, x, y)

    monkeypatch.setattr(autoattack, "_perturb", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, "autoattack-fast", state_dir=tmp_path, **call)
    calls.clear()
    monkeypatch.setattr(autoattack, "_perturb", lambda *given: (calls.append(given[1]), original(*given))[1])
    again = evaluate(model, data, "autoattack-fast", state_dir=tmp_path, **call)
    assert again.accuracy == whole.accuracy
    assert calls[0] == "fab-t", "what the searches had finished was not searched again"
    monkeypatch.setattr(autoattack, "_perturb", lambda ensemble, member, x, y: x)
    plain = evaluate(model, data, "autoattack", state_dir=tmp_path, **call)
    assert not any("not continued" in text for text in plain.warnings)


def test_a_pipe_is_told_within_a_member_and_rarely():
    code = """
import time, torch
from torch import nn
from fastarat.evaluation import evaluate
from fastarat.bars import LineBar
LineBar.EVERY_S = 0.1
class Slow(nn.Module):
    def __init__(self):
        super().__init__(); self.linear = nn.Linear(12, 4)
    def forward(self, x):
        time.sleep(0.005); return self.linear(x.flatten(1))
model = Slow(); x = torch.rand(8, 3, 2, 2); y = model(x).argmax(1)
for progress in (False, True):
    print("progress", progress, file=__import__("sys").stderr)
    evaluate(model, (x, y), "apgd-ce", epsilon=1e-4, progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    quiet, told = done.stderr.split("progress True")
    lines = [line for line in told.splitlines() if line.strip()]
    assert quiet.split() == ["progress", "False"]
    assert 2 <= len(lines) <= 10
    assert all("apgd-ce" in line and "/102" in line and "\r" not in line for line in lines)


def test_a_training_on_a_pipe_says_where_it_is(tmp_path):
    code = f"""
import fastarat
from small import small_config
from fastarat.bars import LineBar
LineBar.EVERY_S = 0.0
for progress in (True, False):
    fastarat.train(small_config({str(tmp_path)!r} + f"/run{{progress}}", epochs=2), progress=progress)
    print("----")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    told, quiet, _ = done.stdout.split("----")
    first, *lines = [line for line in told.splitlines() if ": step " in line]
    assert first == "epoch 1/2: step 0/5", "before any step"
    pattern = r"epoch [12]/2: step [1-5]/5, loss \d+\.\d{3}, clean .*, robust .*, \d+ images/s, \d+ s left"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    steps = [line.partition(",")[0] for line in lines]
    assert steps[-1] == "epoch 2/2: step 5/5"
    assert lines[-1].endswith(" 0 s left")
    assert len({*steps}) == 10
    assert told.count("images/s  ") == 2, "and a line for each epoch, as before"
    assert "\r" not in done.stdout
    assert quiet.strip() == ""
