"""Several processes train as one: the same numbers, and what happens when one of them is stopped, killed or wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import DEFENSES, steps, tiny
from small import metrics, weights

import fastarat
from fastarat.ascent import draw_start
from fastarat.cli import main
from fastarat.data import Augment, load_dataset, make_loader
from fastarat.distributed import Rows, SharedGenerator, World, even, heard, joined
from fastarat.runs import Run
from fastarat.together import check_together, whole_steps

TESTS = Path(__file__).parent
SHORT = ["--limit-train", "160", "--batch-size", "32", "--attack.num-steps", "1", "--eval.val-images", "20", "--model",
         "resnet-small", "--eval.num-steps", "1", "--no-tensorboard", "--defense", "at", "--optim.lr", "0.005", "--epochs",
         "3", "--checkpoint-every", "2", "--threads", "1"]  # fmt: skip


def torchrun(*command: object, restarts: int = 0, kill: str = "") -> subprocess.Popen:
    # A port of the system's choice, since tests may run side by side.
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    line = [sys.executable, "-m", *launcher, f"--max-restarts={restarts}", *map(str, command)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "FASTARAT_TEST_KILL": kill}
    return subprocess.Popen(line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def said(process: subprocess.Popen, code: int | None = 0) -> list[str]:
    """Its own lines, without the launcher's."""
    text, _ = process.communicate(timeout=120)
    assert code is None or process.returncode == code, text
    return [line for line in text.splitlines() if line.startswith(("fastarat: ", "done: ", "continuing"))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes found of everything that is compared, by name: of rank 0 and rank 1."""
    out = tmp_path_factory.mktemp("pair")
    assert said(torchrun(TESTS / "distributed_worker.py", out)) == []
    return [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


def assert_like_one(found, wanted, tolerance: float = 1e-9) -> None:
    readings, state, _ = found
    for own, other in zip(readings, wanted[0], strict=True):
        assert own == pytest.approx(other, abs=1e-5)  # the meter's rows are float32
    assert state.keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        torch.testing.assert_close(state[name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", DEFENSES)
def test_two_processes_train_like_one(pair, name):
    """After 20 steps of uneven shards, with statistics over both: losses, weights, running statistics, predictors."""
    assert_like_one(pair[0][name], steps(name, World()))


def test_weight_perturbation_and_micro_batches_too(pair):
    assert_like_one(pair[0]["awp"], steps("trades", World(), 6, awp=0.01))
    assert_like_one(pair[0]["both"], steps("trades", World(), 6, accumulate=2, batch_size=33))


def test_all_ranks_have_the_same_weights_and_without_sync_bn_statistics_of_their_own(pair):
    for name in pair[0]:
        states = [found[name][1] for found in pair]
        for key in states[0]:
            same = torch.equal(states[0][key], states[1][key])
            assert same == (name != "own" or "running_" not in key), (name, key)


def test_micro_batches_are_the_batch_where_nothing_is_taken_over_it():
    """Without BatchNorm: the gradients' sum is that of the whole batch, whatever it is cut into."""

    def trained(accumulate: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
        example = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        step = fastarat.TrainStep(
            net, fastarat.AT(), example, epsilon=0.1, num_steps=2, start="none", accumulate=accumulate
        )
        for _ in range(3):
            terms = step(example, torch.arange(7))
        assert step.meter.read()["loss"] > 0
        assert int(step.steps) == 3
        return {**step.model.state_dict(), "term": terms["ce_adv"]}

    whole = trained(1)
    for name, value in trained(3).items():
        torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("defense", [fastarat.GAIRAT(), fastarat.CAAT(), fastarat.DONE()], ids=lambda d: d.name)
def test_what_is_taken_over_the_whole_batch_refuses_micro_batches(defense):
    with pytest.raises(fastarat.UserError, match=rf"accumulate=2: {defense.name} .* a whole batch"):
        fastarat.TrainStep(tiny().float(), defense, torch.empty(2, 1, 8, 8), accumulate=2)


def test_a_gradient_that_is_no_mean_refuses_several_processes():
    with pytest.raises(fastarat.UserError, match="ca-at: its backward combines the gradients of a whole batch"):
        fastarat.TrainStep(tiny(), fastarat.CAAT(), torch.empty(2, 1, 8, 8), world=World(0, 2))


def test_rows_of_a_batch():
    for total in range(4, 40):
        for size in (1, 2, 3, 5):
            for accumulate in (1, 2, 3):
                parts = [World(rank, size).parts(total, accumulate) for rank in range(size)]
                rows = sorted(i for own in parts for part in own for i in range(part.start, part.stop))
                assert rows == list(range(total))
                for i in range(accumulate):
                    counts = [own[i].stop - own[i].start for own in parts]
                    assert max(counts) - min(counts) <= 1
    assert [even(7, 3, i) for i in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]


def test_a_last_batch_of_fewer_than_two_per_process_is_left_out():
    assert whole_steps(66, 32, 1, 1) == 3
    assert whole_steps(65, 32, 1, 1) == 2
    assert whole_steps(67, 32, 2, 1) == 2
    assert whole_steps(68, 32, 2, 1) == 3
    with pytest.raises(fastarat.UserError, match=r"batch_size=7 in 2 processes x 2 micro-batches: .* --batch-size 8"):
        whole_steps(100, 7, 2, 2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of one process that the others are to come to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert main(["train", *SHORT, "--quiet", "--out", str(out)]) == 0
    return out


def test_a_run_of_which_a_process_is_killed_goes_on_by_itself(tmp_path, unbroken):
    """In the middle of an epoch, under --max-restarts; and it ends like one that was left alone, in one process."""
    out = tmp_path / "run"
    killed = torchrun(TESTS / "distributed_kill.py", *SHORT, "--sync-bn", "--out", out, restarts=1, kill="1:8:SIGKILL")
    lines = said(killed)
    assert "continuing after epoch 1, step 2 of 5 of epoch 2" in lines, lines
    assert [line for line in lines if line.startswith("done: ")] == [lines[-1]]
    assert_near(out, unbroken)
    assert Run(out).read_config().sync_bn


def test_a_signal_to_one_process_ends_all_and_another_number_goes_on(tmp_path, unbroken, capsys):
    out = tmp_path / "run"
    ended = torchrun(TESTS / "distributed_kill.py", *SHORT, "--sync-bn", "--out", out, kill="1:7:SIGTERM")
    (line,) = said(ended, code=1)
    assert re.search(r"ended by SIGTERM after step [23] of 5 in epoch 2 of 3; nothing is lost: .* --resume", line), line
    assert main(["train", "--resume", str(out)]) == 0
    assert re.search(r"continuing after epoch 1, step [23] of 5 of epoch 2", capsys.readouterr().out)
    assert_near(out, unbroken)


def assert_near(found: Path, wanted: Path) -> None:
    own, other = weights(found), weights(wanted)
    for name, value in other.items():  # float32: another order of sums
        torch.testing.assert_close(own[name].double(), value.double(), atol=2e-3, rtol=2e-3, msg=name)
    for a, b in zip(metrics(found), metrics(wanted), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=2e-3)
        assert a["train/robust_acc"] == pytest.approx(b["train/robust_acc"], abs=0.02)


class Fake(World):
    """The first of two, of which the other said something else."""

    other = None

    def gather(self, value):
        return [value, self.other]


@pytest.mark.parametrize(
    ("command", "environment", "text"),
    [
        ("compare", {"RANK": "0"}, "WORLD_SIZE=2: fastarat compare runs in one process"),
        ("train", {}, "WORLD_SIZE=2 is set and RANK is not: start several processes with torchrun --nproc-per-node=2"),
        ("train --device cuda:1", {"RANK": "0"}, "device=cuda:1: of 2 processes each takes the GPU of its local rank"),
        ("train --device cuda", {"RANK": "0"}, "device=cuda: this machine has no GPU for its 2 processes"),
        ("train", {"RANK": "x"}, "RANK='x' in the environment: expected a number"),
    ],
)
def test_mistakes_before_the_processes_meet(command, environment, text, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    assert main(command.split()) == 2
    assert capsys.readouterr().err.startswith(f"fastarat: {text}")
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(fastarat.UserError, match=r"4 processes on a machine with 2 GPU\(s\): .* --nproc-per-node=2"):
        joined().__enter__()


def test_of_those_who_fail_before_they_met_one_on_each_machine_speaks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for local, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert heard(fastarat.UserError("x")) == speaks


def test_ranks_that_see_different_data_are_told():
    data, config = load_dataset("digits"), fastarat.Config()
    world = Fake(0, 2)
    world.other = "1437 training images of 10 classes"
    with pytest.raises(
        fastarat.UserError, match=r"processes see different data: rank 0 .*, rank 1 1437 training images"
    ):
        check_together(world, config, data)
    with pytest.raises(fastarat.UserError, match=r"diagnostics .* leave --diagnostics out, or torchrun"):
        check_together(world, fastarat.Config(diagnostics=True), data)


def test_batches_of_both_ranks_are_the_batch():
    data = load_dataset("digits").train
    options = {"batch_size": 50, "device": "cpu", "shuffle": True, "augment": Augment(2, flip=True)}
    whole = list(make_loader(data, **options).epoch(3))
    for accumulate in (1, 2):
        ranks = [make_loader(data, **options, world=World(r, 2), accumulate=accumulate) for r in (0, 1)]
        for number, (all_, *parts) in enumerate(zip(whole, *(loader.epoch(3) for loader in ranks), strict=True)):
            assert ranks[0].total(number) == len(all_.labels)
            index = torch.cat([part.index for part in parts])
            place = torch.cat([(all_.index == i).nonzero()[0] for i in index])
            assert sorted(place.tolist()) == list(range(len(all_.labels)))
            assert torch.equal(torch.cat([part.images for part in parts]), all_.images[place])


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "l2"])
def test_ranks_draw_their_own_rows_of_one_noise(kind):
    images = torch.rand(7, 3, 4, 4).to(memory_format=torch.channels_last)
    whole = draw_start(images, epsilon=0.1, kind=kind, generator=torch.Generator().manual_seed(1))
    for own in (slice(0, 4), slice(4, 7)):
        generator = SharedGenerator()
        generator.manual_seed(1)
        generator.rows = Rows(7, own)
        assert torch.equal(draw_start(images[own], epsilon=0.1, kind=kind, generator=generator), whole[own])
