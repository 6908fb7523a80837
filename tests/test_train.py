"""Training end to end on real digits, at a size of seconds; kills and resumes included."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import assert_equal, assert_same, batch, metrics, small_config, step_of, trained, weights, without_times

import fastarat
from fastarat import training
from fastarat.averages import MovingAverage, WeightAverage, averaged_model
from fastarat.config import EvalConfig, OptimConfig, SwaConfig, from_dict, read_yaml
from fastarat.data import Batch, load_dataset
from fastarat.device import pick_device
from fastarat.engine.step import TrainStep, frozen
from fastarat.files import load_checkpoint, load_into, load_weights
from fastarat.finite import Diverged
from fastarat.nets.batchnorm import SplitBatchNorm2d
from fastarat.runs import Run, load_network
from fastarat.training import Trainer, train


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "unbroken")


def test_run_folder(unbroken):
    checkpoints = {f"{which}.{kind}" for which in ("last", "best") for kind in ("pt", "safetensors")}
    assert {p.name for p in unbroken.iterdir()} == {
        "config.yaml",
        "card.txt",
        "metrics.jsonl",
        "previous.pt",
    } | checkpoints
    rows = metrics(unbroken)
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    for key in ("lr", "wall_s", "images_per_s", "train/loss", "train/ce_adv", "train/ce_clean", "train/invariance",
                "train/clean_acc", "train/robust_acc", "val/clean_acc", "val/robust_acc_pgd2"):  # fmt: skip
        assert key in rows[0]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    terms = sum(rows[0][f"train/{t}"] for t in ("ce_adv", "ce_clean", "invariance"))
    assert rows[0]["train/loss"] == pytest.approx(terms)
    saved = from_dict(read_yaml(unbroken / "config.yaml"))
    assert (saved.model, saved.epochs, saved.optim.lr, saved.optim.recipe) == ("resnet-small", 3, 0.1, "arat")
    assert saved.attack.step_size == pytest.approx(0.025)
    best = load_checkpoint(unbroken / "best.pt")
    values = [(r["val/robust_acc_pgd2"], r["val/clean_acc"]) for r in rows]
    value, tie = max(values)
    epoch = 1 + values.index(max(values))
    assert best["best"] == {"epoch": epoch, "by": "robust_acc_pgd2", "value": value, "tie": tie}
    assert load_network(unbroken, "best")[1]["best"] == best["best"]


def test_run_card_says_what_a_number_depends_on(unbroken):
    card = (unbroken / "card.txt").read_text()
    for words in ("ar-at: minimise", "center", "noisy (x + U", "0.1", "step 0.025", "attack BN", "train (batch statistics",
                  "split BatchNorm", "float32", "resident", "Triton kernels", "highest PGD-2 accuracy on 40 validation images; of equal ones", "weight decay 0.0005", "milestones scaled from 100 epochs"):  # fmt: skip
        assert words in card


def scored(monkeypatch, scores):
    """Let the validations score (clean, robust) accuracies given in turn."""
    scores = iter(scores)

    def evaluate(*args, **options):
        return SimpleNamespace(accuracy=dict(zip(("clean_acc", "robust_acc_pgd2"), next(scores), strict=True)))

    monkeypatch.setattr(training, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("defense", "scores", "epoch"),
    [
        (fastarat.Standard(), [(0.4, 0.4), (0.9, 0.1), (0.8, 0.0)], 2),
        (fastarat.Standard(), [(0.9, 0.1), (0.9, 0.2), (0.9, 0.2)], 2),
        (fastarat.AT(), [(0.9, 0.1), (0.4, 0.4), (0.8, 0.3)], 2),
        (fastarat.AT(), [(0.2, 0.0), (0.4, 0.0), (0.3, 0.0)], 2),  # nothing withstands the attack: clean decides
        (fastarat.AT(), [(0.2, 0.1), (0.4, 0.3), (0.4, 0.3)], 2),  # the earlier of two equals
    ],
)
def test_best_is_chosen_by_what_the_defense_is_for(defense, scores, epoch, tmp_path, monkeypatch):
    scored(monkeypatch, scores)
    run = trained(tmp_path / "run", defense=defense)
    assert load_checkpoint(run / "best.pt")["epoch"] == epoch
    assert load_network(run, "best")[1]["best"]["epoch"] == epoch
    first, then = ("clean", "PGD-2") if defense.name == "standard" else ("PGD-2", "clean")
    rule = f"highest {first} accuracy on 40 validation images; of equal ones the highest {then} accuracy"
    assert rule in (run / "card.txt").read_text()


def test_without_validation_images_there_is_no_best(tmp_path):
    run = trained(tmp_path / "run", epochs=1, eval=EvalConfig(val_images=0))
    assert "no validation images: no best" in (run / "card.txt").read_text()
    assert not (run / "best.pt").exists()


@pytest.mark.parametrize("defense", [fastarat.Standard(), fastarat.AT()])
def test_a_run_whose_best_was_chosen_by_another_rule_resumes(defense, tmp_path, monkeypatch, capsys):
    """Before the rule was a defense's own, PGD chose every best, and nothing was said about it."""
    scored(monkeypatch, [(0.5, 0.4), (0.4, 0.3), (0.45, 0.4)])
    run = trained(tmp_path / "run", defense=defense)
    state = torch.load(run / "best.pt")
    assert state["epoch"] == 1
    state["best"] = {"epoch": 1, "value": 0.4}
    torch.save(state, run / "last.pt")
    scored(monkeypatch, [(0.4, 0.3), (0.45, 0.4)])
    train(resume=run)
    if defense.name == "at":
        assert load_checkpoint(run / "best.pt")["epoch"] == 1
        assert "anew" not in capsys.readouterr().out
    else:
        best = load_checkpoint(run / "best.pt")["best"]
        assert best == {"epoch": 3, "by": "clean_acc", "value": 0.45, "tie": 0.4}
        assert "was chosen by the highest PGD-2 accuracy, and is now by the highest clean accuracy: it starts anew " \
            "from epoch 2 on" in capsys.readouterr().out  # fmt: skip


@pytest.mark.parametrize("best", ["missing", None])
def test_a_checkpoint_that_knows_no_best_resumes(best, tmp_path):
    run = trained(tmp_path / "run", epochs=1)
    state = torch.load(run / "last.pt")
    state["best"] = best
    if best == "missing":
        del state["best"]
    torch.save(state, run / "last.pt")
    train(resume=run, progress=False)


def test_same_seed_same_weights_other_seed_other_weights(unbroken, tmp_path):
    trained(tmp_path / "again")
    assert_same(tmp_path / "again", unbroken)
    trained(tmp_path / "other", seed=1, epochs=1)
    assert not torch.equal(weights(tmp_path / "other")["conv1.weight"], weights(unbroken)["conv1.weight"])


KILL = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from small import small_config
from fastarat.engine import step as engine
from fastarat.training import train
calls = 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
{patch}
train(small_config(Path({out!r})), progress=False)
"""
IN_EPOCH = """
add = engine.Meter.add
def patched(self, *args):
    global calls
    calls += 1
    if calls == 8:
        die()
    return add(self, *args)
engine.Meter.add = patched
"""
IN_CHECKPOINT = """
replace = os.replace
def patched(partial, path):
    global calls
    calls += 1
    if Path(path).name == "last.pt":
        if Path(path).exists():
            os.truncate(partial, os.path.getsize(partial) // 2)
            die()
    replace(partial, path)
os.replace = patched
"""
BEFORE_ANY = "engine.Meter.add = lambda self, *args: die()"


@pytest.mark.parametrize(
    ("patch", "epoch"),
    [(IN_EPOCH, 1), (IN_CHECKPOINT, 1), (BEFORE_ANY, None)],
    ids=["mid-epoch", "mid-checkpoint", "before-any-checkpoint"],
)
def test_killed_runs_resume_to_the_same_weights(patch, epoch, unbroken, tmp_path):
    out = tmp_path / "killed"
    code = KILL.format(tests=str(Path(__file__).parent), patch=patch, out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if epoch is None:
        assert not (out / "last.pt").exists()
    else:
        assert load_checkpoint(out / "last.pt")["epoch"] == epoch
    train(resume=out, progress=False)
    assert_same(out, unbroken)


def test_resume_of_a_finished_run_changes_nothing(unbroken, capsys):
    before = {p.name: p.read_bytes() for p in unbroken.iterdir() if p.suffix in (".pt", ".safetensors")}
    train(resume=unbroken)
    assert "nothing to do" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in unbroken.iterdir() if p.name in before} == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(fastarat.UserError, match="nothing to resume"):
        train(resume=tmp_path / "nowhere")


def test_nan_stops_with_step_term_and_checkpoint(tmp_path):
    class Breaks(fastarat.AT):
        def loss(self, views):
            good = super().loss(views)["ce_adv"]
            return {"fine": good, "bad": good * torch.where(views.progress >= 0.6, float("nan"), 1.0)}

    out = tmp_path / "run"
    with pytest.raises(
        Diverged,
        match=r"term 'bad' became NaN or infinite at epoch 2, step 5 of 5; the last good checkpoint is .*last.pt \(epoch 1\)"
        r"\. The usual mend is an --optim.lr below 0.1",
    ):
        trained(out, defense=Breaks())
    assert load_checkpoint(out / "last.pt")["epoch"] == 1
    for value in load_checkpoint(out / "last.pt")["step"]["model"].values():
        assert torch.isfinite(value.float()).all()


@pytest.mark.parametrize("lr", [100, 1e3, 1e5, 1e15])
@pytest.mark.parametrize("name", ["standard", "at", "trades", "mart", "ar-at", "gairat"])
def test_a_run_that_diverges_says_so_and_leaves_only_finite_files(name, lr, tmp_path):
    options = {"limit_train": 320, "epochs": 2, "ema": 0.9, "optim": OptimConfig(lr=lr)}
    out = tmp_path / "run"
    said = ""
    try:
        trained(out, defense=fastarat.DEFENSES[name](), **options)
    except Diverged as error:
        said = str(error)
    assert "became NaN or infinite" in said or (lr < 1e5 and not said)
    assert "check the checkpoint" not in said
    for file in out.glob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values()), file.name
        fastarat.evaluate(load_network(file)[0], load_dataset("digits").test, "clean,pgd-1", epsilon=0.1, limit=50)


def broken(monkeypatch, at: int, damage) -> None:
    """Let `damage(step)` happen to the network after optimiser step number `at`, behind the back of the losses."""
    own, calls = TrainStep.__call__, []

    def call(step, images, labels):
        terms = own(step, images, labels)
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                damage(step)
        return terms

    monkeypatch.setattr(TrainStep, "__call__", call)


def overflow(model: torch.nn.Module, name: str) -> None:
    """Make a branch's statistics finite, but not what comes of them in eval mode; in train mode nothing does."""
    for layer in model.modules():
        if isinstance(layer, SplitBatchNorm2d):
            (layer if name == "adv" else layer.clean).running_mean.fill_(-3e38)


DAMAGES = {
    "weight 'conv1.weight'": lambda step: step.model.conv1.weight.view(-1)[0].fill_(float("nan")),
    "running statistic 'bn1.clean.running_var'": lambda step: step.model.bn1.clean.running_var[0].fill_(float("inf")),
    "weight 'predictor_adv.0.layers.0.weight' of the defense's companions": lambda step: next(
        step.companions.parameters()
    ).fill_(float("inf")),
    "the network's logits in eval mode (BatchNorm branch 'adv')": lambda step: overflow(step.model, "adv"),
    "the network's logits in eval mode (BatchNorm branch 'clean')": lambda step: overflow(step.model, "clean"),
}


@pytest.mark.parametrize("at", [5, 10], ids=["epoch 1", "epoch 2"])
@pytest.mark.parametrize("what", DAMAGES)
def test_what_no_loss_sees_is_found_at_the_epochs_end(what, at, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if at == 10:
        trained(tmp_path / "one", epochs=1, optim=OptimConfig(recipe="constant"))
    broken(monkeypatch, at, DAMAGES[what])
    with pytest.raises(Diverged) as stop:
        trained(out, optim=OptimConfig(recipe="constant"))
    assert f"training stopped: {what} became NaN or infinite by the end of epoch {at // 5} (5 steps)" in str(stop.value)
    if at == 5:
        assert "no checkpoint was written yet" in str(stop.value)
        assert not list(out.glob("*.pt"))
    else:
        assert f"the last good checkpoint is {out / 'last.pt'} (epoch 1)" in str(stop.value)
        assert [row["epoch"] for row in metrics(out)] == [1]
        assert load_checkpoint(out / "last.pt")["epoch"] == load_checkpoint(out / "best.pt")["epoch"] == 1
        assert_equal(weights(out), weights(tmp_path / "one"))


def test_averages_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    def spoil(self, model):
        (self.parameters if isinstance(self, WeightAverage) else list(self.state.values()))[0].fill_(float("inf"))
        self.count += 1

    monkeypatch.setattr(MovingAverage, "update", spoil)
    with pytest.raises(Diverged, match=r"the moving average of 'conv1.weight' became NaN"):
        trained(tmp_path / "ema", ema=0.9)
    assert not list((tmp_path / "ema").glob("*.safetensors"))
    monkeypatch.setattr(WeightAverage, "update", spoil)
    with pytest.raises(Diverged, match=r"the mean of the weights \(SWA\) became NaN .* epoch 2 .*\(epoch 1\)"):
        trained(tmp_path / "swa", swa=True, swa_config=SwaConfig(start=0.4))
    assert not (tmp_path / "swa" / "swa.safetensors").exists()


def test_an_averaged_network_that_overflows_is_not_written(tmp_path, monkeypatch):
    own = training.averaged_model

    def overflown(*args, **options):
        model = own(*args, **options)
        model.bn1.running_var[0] = float("inf")
        return model

    monkeypatch.setattr(training, "averaged_model", overflown)
    with pytest.raises(Diverged, match=r"'bn1.running_var' of the averaged network \(SWA\) became .*\(epoch 3\)"):
        trained(tmp_path / "run", swa=True, swa_config=SwaConfig(start=0.4))
    assert not (tmp_path / "run" / "swa.safetensors").exists()


def test_the_probe_of_a_network_that_overflows_stops_training(tmp_path):
    trainer = Trainer(small_config(tmp_path / "run"))
    overflow(trainer.step.model, "clean")
    with pytest.raises(
        Diverged, match=r"eval mode .BatchNorm branch 'clean'. became NaN or infinite before the first step"
    ):
        trainer._probe("clean", 70, 2)


def test_a_complaint_of_the_validation_is_one_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Watch, "state", lambda *args: None)
    broken(monkeypatch, 10, DAMAGES["the network's logits in eval mode (BatchNorm branch 'adv')"])
    with pytest.raises(Diverged, match=r"logits on the validation images became NaN .* epoch 2 .*last.pt \(epoch 1\)"):
        trained(tmp_path / "run")


def test_a_buffer_that_is_infinite_on_purpose_is_no_divergence(tmp_path, monkeypatch):
    def masked(k, c):
        model = fastarat.build_model("resnet-small", num_classes=k, in_channels=c)
        model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        return model

    monkeypatch.setitem(fastarat.nets.models.MODELS, "masked", masked)
    trained(tmp_path / "run", model="masked", epochs=1, ema=0.9)


def test_loading_runs(unbroken, tmp_path):
    model, meta, config = load_network(unbroken)
    assert (meta["defense"], meta["epoch"], meta["branches"]) == ("ar-at", 3, ["clean", "adv"])
    assert config.epochs == 3
    assert not model.training
    from_pt, _, _ = load_network(unbroken / "last.pt")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), from_pt(x))
    with pytest.raises(fastarat.UserError, match="no swa weights"):
        load_network(unbroken, "swa")


@pytest.mark.parametrize(("name", "classes", "channels"), [("resnet-small", 7, 1), ("preactresnet18", 10, 3)])
def test_another_architecture_is_refused(name, classes, channels, unbroken):
    state, _ = load_weights(unbroken / "last.safetensors")
    with pytest.raises(fastarat.UserError, match="another architecture"):
        load_into(fastarat.build_model(name, num_classes=classes, in_channels=channels), state, Path("x"))


@pytest.mark.parametrize("name", list(fastarat.DEFENSES))
def test_every_defense_trains_resumes_and_averages(name, tmp_path, monkeypatch):
    """The contract: finite terms, a config that reloads equal, a resumed run equal to an unbroken one, SWA."""
    kind, options = fastarat.DEFENSES[name], {}
    if kind.starts_from:
        standard = trained(tmp_path / "standard", defense=fastarat.Standard(), epochs=1)
        options = {kind.starts_from: str(standard)}
    options = {"defense": kind(**options), "swa": True, "swa_config": SwaConfig(start=0.4, every=2)}
    save, save_unfinished, first = Run.save, Run.save_unfinished, {}

    def keep(folder, which, state, meta):
        save(folder, which, state, meta)
        if which == "last" and state["epoch"] == 1:
            first["last.pt"] = (folder.path / "last.pt").read_bytes()

    def keep_unfinished(folder, state, meta):
        save_unfinished(folder, state, meta)
        if state["epoch"] == 1 and state["within"]["steps"] == 2:
            first["unfinished.pt"] = (folder.path / "unfinished.pt").read_bytes()

    monkeypatch.setattr(Run, "save", keep)
    monkeypatch.setattr(Run, "save_unfinished", keep_unfinished)
    run = trained(tmp_path / "run", epochs=2, limit_train=100, checkpoint_every="1", **options)
    assert not (run / "unfinished.pt").exists()
    rows = metrics(run)
    assert len(rows) == 2
    assert all(torch.isfinite(torch.tensor(v)) for row in rows for v in row.values())
    assert from_dict(read_yaml(run / "config.yaml")).defense == options["defense"]
    averaged, meta, _ = load_network(run, "swa")
    assert meta["swa"]
    assert torch.isfinite(averaged(torch.rand(4, 1, 8, 8))).all()
    whole = weights(run)
    for file in ("last.pt", "unfinished.pt"):  # after the first epoch, then within the second
        (run / file).write_bytes(first[file])
        train(resume=run, progress=False)
        assert_equal(weights(run), whole)
        assert without_times(metrics(run)) == without_times(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"swa": True, "swa_config": SwaConfig(start=0.4, every=500)}, "no snapshot would be taken in the 2 epoch"),
        ({"optim": OptimConfig(optimizer="apex")}, "Apex"),
    ],
)
def test_what_cannot_be_had_is_refused_before_a_folder_is_made(options, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(fastarat.UserError, match=words):
        trained(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_swa_after_a_kill_before_its_last_pass(tmp_path):
    """FAT's slack depends on where the run is: a resumed averaging must know that it is at the end."""
    options = {"swa": True, "swa_config": SwaConfig(start=0.4, every=2)}
    run = trained(tmp_path / "a", defense=fastarat.FAT(), epochs=2, **options)
    whole = (run / "swa.safetensors").read_bytes()
    train(resume=run, progress=False)
    assert (run / "swa.safetensors").read_bytes() == whole
    (run / "swa.safetensors").unlink()
    train(resume=run, progress=False)
    assert (run / "swa.safetensors").read_bytes() == whole


def test_resume_without_the_standard_run_it_started_from(tmp_path):
    standard = trained(tmp_path / "standard", defense=fastarat.Standard(), epochs=1)
    run = trained(tmp_path / "cure", defense=fastarat.CURE(pretrained=str(standard)), epochs=2)
    whole = weights(run)
    (run / "last.pt").write_bytes((run / "best.pt").read_bytes())
    standard.rename(tmp_path / "moved")
    train(resume=run, progress=False)
    assert_equal(weights(run), whole)


def test_swa_is_the_mean_of_the_snapshots_with_statistics_of_adversarial_images(tmp_path):
    step = step_of()
    average, snapshots = WeightAverage(step.model), []
    for _ in range(3):
        step(torch.rand(8, 3, 8, 8), torch.randint(4, (8,)))
        average.update(step.model)
        snapshots.append(step.model.conv1.weight.detach().clone())
    batches = [Batch(torch.rand(n, 3, 8, 8), torch.randint(4, (n,)), torch.arange(n)) for n in (8, 4)]
    own = {k: v.clone() for k, v in step.model.state_dict().items()}
    crafted = []
    attack = step.attack
    step.attack = lambda *a, **k: crafted.append(attack(*a, **k)) or crafted[-1]
    model = averaged_model(step, average, batches)
    torch.testing.assert_close(model.conv1.weight, torch.stack(snapshots).mean(0))
    images = [c.images for c in crafted]
    expected = sum(len(x) * model.conv1(x).mean((0, 2, 3)) for x in images) / 12
    torch.testing.assert_close(model.bn1.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.bn1.clean.running_mean, torch.zeros(16))
    assert_equal(step.model.state_dict(), own)
    exact = averaged_model(step, average, batches, exact=True)
    assert not torch.allclose(exact.bn1.running_mean, model.bn1.running_mean)


def test_ema_by_hand_and_through_a_kill(tmp_path):
    model = torch.nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.5)
    expected = 1.0
    for n, value in enumerate((3.0, 5.0)):
        with torch.no_grad():
            model.weight.fill_(value)
            model.num_batches_tracked += 1
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert average.state["weight"].item() == pytest.approx(expected)
    assert average.state["num_batches_tracked"] == 2
    whole, halves = (trained(tmp_path / n, ema=0.9, epochs=2) for n in "ab")
    state = load_checkpoint(halves / "best.pt")
    assert state["ema"]["count"] == 5 * state["epoch"]
    (halves / "last.pt").write_bytes((halves / "best.pt").read_bytes())
    train(resume=halves, progress=False)
    a, b = (load_file(run / "ema.safetensors") for run in (whole, halves))
    assert_equal(a, b)
    assert not torch.equal(a["conv1.weight"], weights(whole)["conv1.weight"])
    averaged, meta, _ = load_network(whole, "ema")
    assert meta["ema"] == 0.9
    assert torch.isfinite(averaged(torch.rand(2, 1, 8, 8))).all()


def test_a_bf16_step_keeps_statistics_losses_and_images_in_float32():
    step = step_of(num_steps=2, precision="bf16")
    terms = step(torch.rand(8, 3, 8, 8), torch.randint(4, (8,)))
    assert all(t.dtype == torch.float32 and torch.isfinite(t) for t in terms.values())
    assert step.attack(torch.rand(4, 3, 8, 8), torch.randint(4, (4,))).images.dtype == torch.float32
    assert step.model.bn1.running_mean.dtype == torch.float32
    assert next(step.model.parameters()).grad.dtype == torch.float32


def test_attack_modes_and_frozen_parameters():
    model = fastarat.build_model("resnet-small", num_classes=4)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    updates = {}
    for mode in ("eval", "train", "train-frozen"):
        step = step_of(fastarat.AT(), num_steps=3, attack_bn=mode)
        step(*batch())
        updates[mode] = step.model.bn1.num_batches_tracked.item()
        assert step.model.training
    assert updates == {"eval": 1, "train": 4, "train-frozen": 1}


def test_the_step_reads_nothing_back_from_the_device(monkeypatch):
    step = step_of()
    step(torch.rand(4, 3, 8, 8), torch.randint(4, (4,)))

    def refuse(*args, **kwargs):
        raise AssertionError("the step read a tensor on the host")

    monkeypatch.setattr("fastarat.checks.waits", lambda images: True)  # as on a GPU
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    step(torch.rand(4, 3, 8, 8), torch.randint(4, (4,)))


def test_probe_is_the_clean_branch_in_eval_mode_on_augmented_training_images(tmp_path):
    trainer = Trainer(small_config(tmp_path / "run"))
    model = trainer.step.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.bn1.clean.register_buffer("running_mean", model.bn1.clean.running_mean + 3)
    calls, forward = [], model.forward
    model.forward = lambda x: calls.append((model.training, model.bn1.route.groups, len(x))) or forward(x)
    accuracy = trainer._probe("clean", 70, 1)
    assert calls == [(False, ("clean",), 32)] * 3
    assert 0 <= accuracy <= 1
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "bn1.clean.running_mean")


def test_a_last_batch_of_one_is_left_out(tmp_path):
    run = trained(tmp_path / "run", limit_train=129, batch_size=64, epochs=1)
    assert "1 epoch x 2 steps" in (run / "card.txt").read_text()


def test_apex_asked_for_and_installed(tmp_path, monkeypatch):
    """A stand-in with FusedSGD's signature (NVIDIA Apex needs a GPU and a source build): it gets our values and is used."""
    seen = {}

    class FusedSGD(torch.optim.SGD):
        def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
            seen.update(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
            super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)

        def step(self, closure=None):
            seen["steps"] = seen.get("steps", 0) + 1
            return super().step(closure)

    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedSGD=FusedSGD))
    run = trained(tmp_path / "run", epochs=1, optim=OptimConfig(optimizer="apex"))
    assert seen == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "steps": 5}
    assert "Apex FusedSGD" in (run / "card.txt").read_text()


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_cuda_device_has_its_number(monkeypatch, name):
    """torch.cuda.set_device refuses one without."""
    for function, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, function, lambda value=value: value)
    assert pick_device(name) == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
