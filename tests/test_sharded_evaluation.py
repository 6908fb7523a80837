"""Evaluation by two processes (gloo): the numbers, and the state, are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import shorten_autoattack, trained
from torch import nn

import fastarat
from fastarat import cli
from fastarat.data import load_dataset
from fastarat.distributed import World, joined
from fastarat.errors import UserError
from fastarat.evaluation import Evaluation, collect, evaluate
from fastarat.evaluation.sharing import together

HERE = Path(__file__).parent
EPSILON = 0.08
LIST = "clean,pgd-4,cw-3-2,autoattack,transfer,worst"
CALL = {"attack": LIST, "epsilon": EPSILON, "batch_size": 8, "progress": False}
# The slow ones, on a few images.
SLOW = {
    "attack": "pgd-1,corruptions",
    "epsilon": EPSILON,
    "limit": 6,
    "batch_size": 2,
    "curves": True,
    "progress": False,
}
# Three batches and a short one.
IMAGES = 28


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return fastarat.build_model("resnet-small", num_classes=10, in_channels=1, image_size=8).eval()


def data():
    return collect(load_dataset("digits").test, limit=IMAGES)


def weights(folder: Path) -> nn.Module:
    model = network()
    model.load_state_dict(torch.load(folder / "weights.pt"))
    return model


def without_times(result: Evaluation) -> dict:
    """All that a result says but for the time it took; as it comes back from JSON."""
    found = json.loads(result.to_json())
    found["settings"].pop("processes", None)
    return {key: value for key, value in found.items() if key not in ("wall_s", "sha256")}


def worker(folder: Path) -> None:
    """What each of the two does. Their torch has one thread, as in the test."""
    torch.set_num_threads(1)
    with joined("cpu") as world, pytest.MonkeyPatch.context() as patch:
        shorten_autoattack(patch, apgd=4, fab=2, square=12)
        model = weights(folder)
        everything = evaluate(model, data(), source=network(1), world=world, **CALL)
        slow = evaluate(model, data(), world=world, **SLOW)
        found: dict = {"all": without_times(everything), "slow": without_times(slow)}
        # One process was interrupted here: two go on.
        state = folder / "interrupted"
        calls: list[int] = []
        count(patch, calls)
        resumed = evaluate(model, data(), "autoattack", epsilon=EPSILON, batch_size=8, state_dir=state, world=world)
        found |= {"resumed": resumed.autoattack, "calls": [*calls]}
        # And here two leave what one goes on with.
        interrupt_all(patch, 2)
        try:
            whole = folder / "left"
            evaluate(model, data(), "autoattack", epsilon=EPSILON, batch_size=8, state_dir=whole, world=world)
        except KeyboardInterrupt:
            found["left"] = True
        errors = found["errors"] = {}
        for name, network_of, images in (
            ("weights", lambda: network(world.rank), data()),
            ("images", lambda: model, tuple(t[world.rank :][:20] for t in data())),
            ("not finite", lambda: Broken(model, broken=world.rank == 1), data()),
        ):
            try:
                evaluate(network_of(), images, "clean", batch_size=8, world=world)
            except UserError as error:
                errors[name] = str(error)
        (folder / f"{world.rank}.json").write_text(json.dumps(found))


class Broken(nn.Module):
    """Not finite after its first batches, on one rank."""

    def __init__(self, model: nn.Module, broken: bool) -> None:
        super().__init__()
        self.model, self.broken, self.calls = model, broken, 0

    def forward(self, images):
        self.calls += 1
        return self.model(images) / (0.0 if self.broken and self.calls > 3 else 1.0)


def count(patch, calls: list[int], at: int | None = None) -> None:
    """Note the size of every batch of APGD-CE; stop at the call of this number."""
    from pyautoattack.autopgd_base import APGDAttack

    original = APGDAttack.perturb

    def perturb(self, x, *args, **options):
        calls.append(len(x))
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, x, *args, **options)

    patch.setattr(APGDAttack, "perturb", perturb)


def interrupt_all(patch, at: int) -> None:
    count(patch, [], at)


def launch(*argv: str | Path, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False, **options)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder, and what one process and two found."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        shorten_autoattack(patch, apgd=4, fab=2, square=12)
        step = fastarat.TrainStep(
            network().train(), fastarat.AT(), torch.empty(2, 1, 8, 8), epsilon=EPSILON, num_steps=2
        )
        images, labels = collect(load_dataset("digits").train, limit=448)
        for epoch in range(3):
            step.set_lr(0.05)
            for rows in torch.randperm(448, generator=torch.Generator().manual_seed(epoch)).split(64):
                step(images[rows], labels[rows])
        torch.save(step.model.state_dict(), folder / "weights.pt")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model = weights(folder)
            one = without_times(evaluate(model, data(), source=network(1), **CALL))
            slow = without_times(evaluate(model, data(), **SLOW))
            calls: list[int] = []
            count(patch, calls, at=3)
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, data(), "autoattack", epsilon=EPSILON, batch_size=8, state_dir=folder / "interrupted")
        finally:
            torch.set_num_threads(threads)
    done = launch(Path(__file__), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, one, slow, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_find_what_one_finds(both):
    _, one, slow, two = both
    # Counts by class, confusion, what each member left, curves, corruptions, warnings, the largest perturbation: all.
    assert 0.1 < one["accuracy"]["robust_acc_worst"] < one["accuracy"]["robust_acc_pgd4"] < one["accuracy"]["clean_acc"]
    for found in two:
        assert (found["all"], found["slow"]) == (one, slow)
    assert slow["curves"]["steps"]["accuracy"]
    assert len(slow["corruptions"]) == 15


def test_autoattack_goes_on_with_another_number_of_processes(both, monkeypatch):
    folder, one, _, two = both
    for found in two:
        assert found["resumed"] == one["autoattack"]
    # Two batches of APGD-CE were there: the others are dealt.
    left = round(IMAGES * one["autoattack"]["clean"]) - 16
    attacked = [sum(found["calls"]) for found in two]
    assert sum(attacked) == left
    assert all(attacked)
    assert all(found["left"] for found in two)
    shorten_autoattack(monkeypatch, apgd=4, fab=2, square=12)
    calls: list[int] = []
    count(monkeypatch, calls)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = weights(folder)
        last = evaluate(model, data(), "autoattack", epsilon=EPSILON, batch_size=8, state_dir=folder / "left")
    finally:
        torch.set_num_threads(threads)
    assert last.autoattack == one["autoattack"]
    assert sum(calls) == left, "the first round of two, a batch each, was kept"


def test_what_fails_on_one_fails_on_all_in_words(both):
    _, _, _, two = both
    for found in two:
        assert found["errors"].keys() == {"weights", "images", "not finite"}
        assert "different weights: rank 0" in found["errors"]["weights"]
        assert "different images: rank 0" in found["errors"]["images"]
        assert "NaN or infinite logits" in found["errors"]["not finite"]


def test_what_another_rank_raises_is_told_in_words():
    """A world of one is called as it is: nothing is caught there."""
    with pytest.raises(ZeroDivisionError):
        together(World(), lambda: 1 // 0)


def test_fewer_batches_than_processes_are_noted():
    from fastarat.evaluation.evaluate import evaluate as measured

    class Alone(World):
        """One of three, the others of which are silent."""

        def gather(self, value):
            return [value]

    world = Alone(rank=0, size=3)
    result = measured(network(), data(), "clean", batch_size=28, world=world)
    assert any("are 1 batch(es) for 3 processes" in text for text in result.warnings)


def test_the_command_under_torchrun_prints_and_writes_once(tmp_path):
    run = trained(tmp_path / "run", epochs=1)
    done = launch("-m", "fastarat", "eval", run, "--attack", "clean,pgd-2", "--batch-size", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved:") == done.stdout.count("interval") == 1
    assert "2 processes" in done.stdout
    found = json.loads((run / "eval.json").read_text())
    assert found["settings"]["processes"] == 2


def test_one_of_several_processes_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_AFTER_YOU_S", 0.0)
    for rank in range(2):
        for name, value in (("WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        assert cli.main(["eval", "nowhere", "--attack", "pgd"]) == 2
    said = capsys.readouterr().err
    assert said.count("fastarat: unknown attack 'pgd'") == said.count("\n") == 1


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
