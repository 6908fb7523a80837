"""What a training says of itself while it runs: rows for machines, lines for people."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fastarat.errors import UserError
from fastarat.runs import Run


@contextlib.contextmanager
def logging(folder: Run, tensorboard: bool, purge_step: int | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Lend a function that appends an epoch's row to metrics.jsonl, and to TensorBoard's events where wanted."""
    if not tensorboard:
        yield folder.append_metrics
        return
    from torch.utils.tensorboard import SummaryWriter

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except OSError as error:  # its own thread writes: what that could not is raised at a later call
            where, why = folder.tensorboard_dir, error.strerror or error
            raise UserError(
                f"cannot write {where}: {why}. Free space, or leave it out with --no-tensorboard"
            ) from error

    def log(row: dict[str, Any]) -> None:
        folder.append_metrics(row)
        with told():
            for key, value in row.items():
                if key != "epoch":
                    writer.add_scalar(key, value, row["epoch"])

    def quiet(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            hook(args)

    hook, threading.excepthook = threading.excepthook, quiet  # or the thread's traceback would be printed besides
    try:
        with told():
            writer = SummaryWriter(str(folder.tensorboard_dir), purge_step=purge_step)
        try:
            yield log
        finally:
            with told():
                writer.close()
    finally:
        threading.excepthook = hook


def in_short(value: float) -> str:
    """A loss in a few digits, however large."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in a line."""
    parts = [f"epoch {row['epoch']:>3}/{epochs}", f"lr {row['lr']:.4g}", f"loss {in_short(row['train/loss'])}"]
    train = [
        f"{short} {row[f'train/{key}']:.1%}"
        for key, short in (("clean_acc", "clean"), ("robust_acc", "attacked"))
        if f"train/{key}" in row
    ]
    parts.append("train " + ", ".join(train))
    val = [
        f"{key.removeprefix('val/').replace('_acc', '').replace('robust_', '')} {value:.1%}"
        for key, value in row.items()
        if key.startswith("val/")
    ]
    if val:
        parts.append("val " + ", ".join(val))
    return "  ".join([*parts, f"{row['images_per_s']:.0f} images/s", f"{row['wall_s']:.1f} s"])
