"""Long health: what a process holds stays the same however long it trains."""

import gc
import os
from pathlib import Path

import pytest
import torch

from fastarat.data import load_dataset, make_loader, prepare


def held() -> tuple[int, float]:
    """Open files, and MB of resident memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return len(os.listdir("/proc/self/fd")), int(anonymous.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_reading_a_beton_again_and_again_keeps_nothing(tmp_path):
    """Every validation opens a reader: each compiled a function for itself, 3 MB, and left the file mapped."""
    pytest.importorskip("ffcv")
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
