"""Long health: what a process holds stays the same however long it trains."""

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import soak_watched
import torch

from fastarat.data import load_dataset, make_loader, prepare


def held() -> tuple[int, float]:
    """Open files, and MB of resident memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return len(os.listdir("/proc/self/fd")), int(anonymous.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_reading_a_beton_again_and_again_keeps_nothing(tmp_path, ffcv):
    """Every validation opens a reader: each compiled a function for itself, 3 MB, and left the file mapped."""
    prepare("digits", tmp_path / "digits", data_dir=tmp_path)
    split = load_dataset(str(tmp_path / "digits"), data_dir=tmp_path, val_images=40).val

    def read() -> torch.Tensor:
        return next(iter(make_loader(split, batch_size=40, device="cpu").epoch(0))).images

    pixels = read()
    gc.collect()
    gc.disable()  # what is released must not have to wait for it
    try:
        files, memory = held()
        for _ in range(40):
            assert torch.equal(read(), pixels)
        files_after, memory_after = held()
    finally:
        gc.enable()
    assert files_after == files
    assert memory_after - memory < 20, "of 130 where each compiled its own"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_minute_of_make_soak(tmp_path):
    """Nothing of a growth can be ruled out in a minute; that half an hour rules it out is in docs/reliability.md."""
    record = soak.soak(1.0, seed=0, folder=tmp_path, least_slope=50.0, only="ar-at")
    assert record["violations"] == []
    assert record["killed"]["rounds"] >= 1
    assert sum(record["killed"]["endings"].values()) >= 1
    assert record["watched"]["epochs"] > 20
    assert len(soak.in_words(record).splitlines()) == 10


def test_a_run_ended_just_after_an_epoch_keeps_what_it_says():
    """The soak asked each for an unfinished.pt, and an epoch's end leaves last.pt alone: one run of ten failed."""
    said = "error: ended by SIGTERM after {} of 100000; nothing is lost: fastarat train --resume there goes on"
    assert soak_watched.promised_in(said.format("epoch 4")) == (4, 0)
    assert soak_watched.promised_in(said.format("step 3 of 10 in epoch 5")) == (4, 3)
    assert soak_watched.promised_in("ended at once by a second SIGTERM; the last checkpoint stands") is None


def test_the_soak_sees_what_it_looks_for(tmp_path):
    wave = [0.5 * math.sin(epoch) for epoch in range(400)]
    slope, error = soak_watched.slope_of([(epoch, 600 + 0.08 * epoch + wave[epoch]) for epoch in range(400)])
    assert abs(slope - 8) < 2 * error < 0.5
    slope, error = soak_watched.slope_of([(epoch, 600 + wave[epoch]) for epoch in range(400)])
    assert abs(slope) < 2 * error < 0.5

    weights = {"w": torch.zeros(3), "n": torch.tensor(1)}
    assert soak.equal({"a": weights, "b": [1]}, {"a": {**weights, "w": torch.zeros(3)}, "b": [1]})
    for other in (
        {"a": weights},
        {"a": {**weights, "w": torch.tensor([0.0, 0, 1e-7])}, "b": [1]},
        {"a": weights, "b": [2]},
    ):
        assert not soak.equal({"a": weights, "b": [1]}, other)

    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    subprocess.run([sys.executable, "-c", child], check=True, env=soak.environment("left"))
    (pid,) = soak.running("left")
    os.kill(pid, 9)

    found = soak.Found(3)
    found.expect(True, "fine")
    found.expect(False, "not fine")
    assert found.violations == ["not fine"]
