"""What `tools/fuzz.py` feeds to each reader: inputs to begin with, and mutations that get past the first check.

A mutation keeps the container whole (a zip's and a checkpoint's CRCs, a safetensors header's length, a tar's header
sums) and damages what lies in it; blind bit flips would be refused at the door.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import fastarat
from fastarat.config import Config, from_dict, read_yaml, to_dict
from fastarat.data import load_dataset
from fastarat.errors import UserError
from fastarat.files import load_checkpoint, load_weights
from fastarat.interchange import import_checkpoint
from fastarat.report import subjects
from fastarat.resuming import config_to_resume, newest
from fastarat.runs import Run, load_network
from tools.mutations import Reader, disturbed, havoc, json_mutated
from tools.readers_of_data import ArchiveReader, BetonReader


class ConfigReader(Reader):
    """config.yaml, as `train --config` and every reader of a run folder."""

    def __init__(self, private: Path) -> None:
        super().__init__(private)
        self.tree = to_dict(Config(awp=0.01, ema=0.9, epochs=5, checkpoint_every="10min"))
        self.seeds = [yaml.safe_dump(self.tree).encode(), b"defense: trades\noptim: {lr: 0.1}\n", b""]

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        if source.random() < 0.6:
            with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError, AttributeError):
                return yaml.safe_dump(disturbed(yaml.safe_load(data) or self.tree, source)).encode()
        return havoc(data, source)

    def read(self, data: bytes) -> None:
        path = self.written("config.yaml", data)
        to_dict(from_dict(read_yaml(path), source=str(path), code=False))


def tiny_run(folder: Path) -> Path:
    """The folder of a short training."""
    config = Config(
        limit_train=20, batch_size=10, epochs=1, tensorboard=False, out=str(folder), data_dir=str(folder.parent),
        attack=fastarat.Attack(epsilon=0.1, num_steps=1), eval=fastarat.config.EvalConfig(val_images=10, num_steps=1),
    )  # fmt: skip
    return fastarat.train(config, progress=False).run


class CheckpointReader(Reader):
    """PyTorch's .pt files: a run's own and others', which are imported."""

    def __init__(self, private: Path) -> None:
        super().__init__(private)
        run = tiny_run(private / "run")
        self.run = Run(run)
        last = load_checkpoint(run / "last.pt")
        (run / "last.pt").unlink()  # or every input that is refused would cost reading this one
        small = {
            "format": last["format"],
            "epoch": 1,
            "meta": last["meta"],
            "config": last["config"],
            "best": last["best"],
        }
        model = {"conv.weight": torch.ones(2, 1, 1, 1), "fc.bias": torch.zeros(10)}
        for content in (
            {**small, "step": {"model": model, "optimizer": {}}, "average": None, "ema": None},
            {
                "state_dict": {f"module.{key}": value for key, value in model.items()},
                "epoch": 3,
                "best": np.float64(0.5),
            },
            fastarat.build_model("resnet-small", num_classes=10, in_channels=1).state_dict(),
        ):
            for zipped in (True, False):
                out = io.BytesIO()
                torch.save(content, out, _use_new_zipfile_serialization=zipped)
                if out.tell() < 500_000:
                    self.seeds.append(out.getvalue())

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = [(name, archive.read(name)) for name in archive.namelist()]
        except Exception:
            return havoc(data, source)
        if not entries or source.random() < 0.1:
            return havoc(data, source)
        at = source.randrange(len(entries))
        name, content = next((e for e in entries if e[0].endswith("data.pkl")), entries[at])
        if source.random() < 0.3:
            name, content = entries[at]
        entries = [(n, havoc(c, source) if n == name else c) for n, c in entries]
        if source.random() < 0.1:
            entries[at] = (havoc(entries[at][0].encode(), source).decode("latin-1"), entries[at][1])
        if source.random() < 0.05:
            del entries[at]
        out = io.BytesIO()
        with contextlib.suppress(Exception), zipfile.ZipFile(out, "w") as archive:
            for entry, content in entries:
                archive.writestr(entry, content)
        return out.getvalue()

    def read(self, data: bytes) -> None:
        path = self.written("run/unfinished.pt", data)
        refusals = 0
        for read in (lambda: load_weights(path), lambda: newest(self.run)):
            try:
                read()
            except UserError as error:
                refusals, last = refusals + 1, error
        out = self.private / "imported"
        shutil.rmtree(out, ignore_errors=True)
        try:
            import_checkpoint(path, out)
        except UserError:
            if refusals:
                raise last from None


class SafetensorsReader(Reader):
    """Weights, sealed ones and those from before there were seals, whose metadata is all there is to trust."""

    def __init__(self, private: Path) -> None:
        super().__init__(private)
        run = tiny_run(private / "run")
        content = (run / "last.safetensors").read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        sealed = header["__metadata__"]["fastarat.sealed"]
        kept = {key: value for key, value in header.items() if key == "__metadata__"}
        for metadata in ({"fastarat.sealed": sealed}, {"fastarat": sealed.split(" ", 1)[1]}):
            kept = {"__metadata__": metadata, "fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
            self.seeds.append(self.packed(kept, bytes(8)))
            self.seeds.append(self.packed({**header, "__metadata__": metadata}, content[8 + size :]))

    @staticmethod
    def packed(header: Any, rest: bytes) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + rest

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        if len(data) < 8 or source.random() < 0.1:
            return havoc(data, source)
        size = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
        text, rest = data[8 : 8 + size], data[8 + size :]
        if source.random() < 0.6:
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError, AttributeError):
                header = json.loads(text)
                kept = header["__metadata__"]
                name = source.choice(list(kept))
                seal, _, meta = kept[name].rpartition(" {") if name.endswith("sealed") else ("", "", kept[name])
                meta = disturbed(json.loads(f"{{{meta}" if seal else meta), source)
                kept[name] = f"{seal} {json.dumps(meta)}" if seal else json.dumps(meta)
                return self.packed(header, rest)
        return self.packed(json_mutated(text, source), rest)

    def read(self, data: bytes) -> None:
        path = self.written("weights.safetensors", data)
        load_weights(path)
        load_network(path)


class MetricsReader(Reader):
    """What a report reads of a run besides its weights; the first byte of an input says which file it is."""

    names = ("metrics.jsonl", "eval.json", "config.yaml", "card.txt")

    def __init__(self, private: Path) -> None:
        super().__init__(private)
        self.run = Run(tiny_run(private / "run"))
        dataset = load_dataset("digits", data_dir=private)
        model, _, _ = load_network(self.run.path)
        fastarat.evaluate(model, dataset.test, "clean,pgd-2", epsilon=0.1, limit=10, progress=False).save(
            self.run.evaluation()
        )
        self.kept = {name: (self.run.path / name).read_bytes() for name in self.names}
        self.seeds = [bytes([i]) + content for i, content in enumerate(self.kept.values())]
        self.seeds.append(b"\0" + 3 * self.kept["metrics.jsonl"])
        self.chance = random.Random(0)

    def mutate(self, data: bytes, source: random.Random) -> bytes:
        if not data:
            return b"\0"
        kind, text = data[0] % 4, data[1:]
        if kind == 0:
            lines = text.split(b"\n")
            at = source.randrange(len(lines))
            lines[at] = json_mutated(lines[at], source)
            return data[:1] + b"\n".join(lines)
        return data[:1] + (json_mutated(text, source) if kind == 1 else havoc(text, source))

    def read(self, data: bytes) -> None:
        for name, content in self.kept.items():
            self.written(f"run/{name}", content)
        name = self.names[data[0] % 4 if data else 0]
        self.written(f"run/{name}", data[1:])
        match name:
            case "metrics.jsonl":
                self.run.metrics()
                self.run.last_validation()
                self.run.truncate_metrics(1)
            case "eval.json":
                for which, found in self.run.evaluations().items():
                    self.run.stale(which, found)
            case "config.yaml":
                config_to_resume(self.run, {})
        if name == "card.txt" or self.chance.random() < 0.1:  # it reads weights, too: slow
            subjects.read([self.run.path])


READERS: dict[str, Callable[[Path], Reader]] = {
    "config": ConfigReader,
    "checkpoint": CheckpointReader,
    "safetensors": SafetensorsReader,
    "archive": ArchiveReader,
    "beton": BetonReader,
    "metrics": MetricsReader,
}
