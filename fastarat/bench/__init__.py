"""How fast a training step is here: `bench` measures the trainer's loop, `harness` is what all timing shares."""

from fastarat.bench.bench import BenchConfig, bench, make_step, render
from fastarat.bench.harness import write_record

__all__ = ["BenchConfig", "bench", "make_step", "render", "write_record"]
