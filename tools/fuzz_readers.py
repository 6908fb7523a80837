"""What `fuzz.py` feeds: each reader's inputs to begin with, mutations that keep to its format, and the call itself.

`read` returns for what is accepted and raises UserError for what is refused; all else is a finding.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_mutators import changed_bytes, changed_tar, changed_tree, changed_zip, tables, tarred, zipped
from PIL import Image
from torch import nn

from fastarat import build_model, evaluate
from fastarat.compare import compare
from fastarat.config import Config, from_dict, read_yaml, to_dict
from fastarat.data import info, load_dataset, make_loader, prepare
from fastarat.errors import UserError
from fastarat.files import load_checkpoint, load_weights, save_tensors, save_weights, seal
from fastarat.interchange.importing import import_checkpoint
from fastarat.runs import Run, load_network


class Reader:
    """folder: a private one, where nothing else is; `read` leaves in it what it likes."""

    may: tuple[str, ...] = ()
    """Events that a reader causes by itself, though `fuzz.Guard` listens for them."""
    seconds = 2.0
    """Of the processor's time, the most for one input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        raise NotImplementedError

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Return an input like `data` that still keeps to the format where blind changes would not."""
        return changed_bytes(data, rng)

    def read(self, data: bytes) -> None:
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def clean(self, name: str) -> Path:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


class ConfigReader(Reader):
    """A config of a stranger's run: YAML, then every value; what is accepted must come back equal once written."""

    seconds = 10.0  # PyYAML is 18 times slower when its coverage is watched

    def seeds(self) -> list[bytes]:
        configs = [to_dict(Config()), {"defense": {"name": "trades", "beta": 6}, "swa": {"start": 2}, "awp": 0.005}]
        texts = [yaml.safe_dump(config, sort_keys=False).encode() for config in configs]
        return [
            *texts,
            b"a: &a [1]\nb: *a\n<<: {c: 1}\n",
            b"defense: other.py:Mine\nepochs: .inf\n",
            b"? [a]\n: !!set {b}\n",
        ]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        try:
            tree = yaml.safe_load(data)
            return yaml.safe_dump(changed_tree(tree, rng), sort_keys=False, allow_unicode=True).encode(
                "utf-8", "surrogatepass"
            )
        except Exception:
            return changed_bytes(data, rng)

    def read(self, data: bytes) -> None:
        path = self.put("config.yaml", data)
        config = from_dict(read_yaml(path), source=str(path), code=False)
        again = self.put(
            "again.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode("utf-8", "backslashreplace")
        )
        if to_dict(from_dict(read_yaml(again), source=str(again), code=False)) != to_dict(config):
            raise AssertionError("an accepted config is another one when it is written and read again")


class _Weights(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.network = build_model("resnet-small", num_classes=2, in_channels=1, image_size=8)
        self.meta: dict[str, Any] = {
            "model": "resnet-small", "num_classes": 2, "in_channels": 1, "image_size": 8, "normalized": False,
            "branches": [], "defense": "standard", "dataset": "digits", "classes": ["a", "b"], "epsilon": 0.1,
            "norm": "linf", "epoch": 1,
        }  # fmt: skip
        self.small = {"fc.weight": torch.ones(2, 3), "x": torch.tensor(1), "h": torch.ones(2, dtype=torch.float16)}

    def imported(self, path: Path) -> None:
        refused = None
        for call in (lambda: load_network(path), lambda: import_checkpoint(path, self.clean("imported"))):
            try:
                call()
            except UserError as error:
                refused = error
        if refused:
            raise refused


class SafetensorsReader(_Weights):
    """Weights of a stranger: as they are, and with their metadata changed and sealed again."""

    def seeds(self) -> list[bytes]:
        path = self.folder / "seed.safetensors"
        found = []
        for weights in (self.small, self.network.state_dict()):
            save_weights(path, weights, self.meta)
            found.append(path.read_bytes())
        return [found[0], found[0], found[1]]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        size = int.from_bytes(data[:8], "little")
        try:
            if rng.random() < 0.5:
                weights, meta = load_weights(self.put("parent.safetensors", data))
                path = self.folder / "child.safetensors"
                save_weights(path, weights, changed_tree({k: v for k, v in meta.items() if k != "sha256"}, rng))
                return path.read_bytes()
            header = json.dumps(changed_tree(json.loads(data[8 : 8 + size]), rng)).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + size :]
        except Exception:
            return changed_bytes(data, rng)

    def read(self, data: bytes) -> None:
        self.imported(self.put("x.safetensors", data))


class CheckpointReader(_Weights):
    """torch.save's archives, their checksums right again after a change; also what others' files hold."""

    def seeds(self) -> list[bytes]:
        path, found = self.folder / "seed.pt", []
        small = {"format": 1, "epoch": 1, "meta": self.meta, "step": {"model": self.small}}
        others = {"state_dict": {"module.fc.weight": torch.ones(2, 3)}, "acc": np.float64(0.5), "epoch": 3}
        for state in (
            small,
            others,
            small | {"step": {"model": self.network.state_dict()}},
            {"a": torch.ones(2).T[None]},
        ):
            save_tensors(path, state)
            found.append(path.read_bytes())
        torch.save(others, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
        return [*found, legacy.getvalue()]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        return changed_zip(data, rng) if data[:2] == b"PK" else changed_bytes(data, rng)

    def read(self, data: bytes) -> None:
        path = self.put("x.pt", data)
        try:
            load_checkpoint(path)
        except UserError:
            import_checkpoint(path, self.clean("imported"))
        else:
            self.imported(path)


class ArchiveReader(Reader):
    """An image archive, tar or zip by its first bytes; afterwards nothing may have appeared outside its folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "outside").mkdir(parents=True, exist_ok=True)
        (folder / "outside" / "kept").write_text("as it was")

    def seeds(self) -> list[bytes]:
        members = []
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                kind = "PNG" if name == "cat" else "JPEG"
                Image.fromarray(np.full((8, 8, 3), 9 * len(members), np.uint8)).save(file := io.BytesIO(), kind)
                members.append((f"{split}/{name}/0.{kind.lower()}", file.getvalue()))
        tar = tarred([(tarfile.TarInfo(name), content) for name, content in members])
        return [tar, zipped(members), gzip.compress(tar, mtime=0)]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if data[:2] == b"\x1f\x8b":
            try:
                return (
                    gzip.compress(changed_tar(gzip.decompress(data), rng), mtime=0)
                    if rng.random() < 0.7
                    else changed_bytes(data, rng)
                )
            except Exception:
                return changed_bytes(data, rng)
        if rng.random() < 0.4:
            return changed_bytes(data, rng)
        return changed_zip(data, rng) if data[:2] == b"PK" else changed_tar(data, rng)

    def read(self, data: bytes) -> None:
        box = self.clean("box")
        suffix = {b"PK": "zip", b"\x1f\x8b": "tar.gz"}.get(data[:2], "tar")
        path = self.put(f"box/x.{suffix}", data)
        try:
            info(path, data_dir=box / "data")
        finally:
            self._check(box)

    def _check(self, box: Path) -> None:
        there = sorted(os.listdir(self.folder)), sorted(os.listdir(self.folder / "outside"))
        if there != (["box", "outside"], ["kept"]) or (self.folder / "outside" / "kept").read_text() != "as it was":
            raise AssertionError(f"written outside its folder: {there}")
        if extra := set(os.listdir(box)) - {"data"} - {p.name for p in box.glob("x.*")}:
            raise AssertionError(f"written outside its folder: {extra}")
        blocks = sum(path.lstat().st_blocks for path in (box / "data").rglob("*"))
        if blocks > 100_000:  # of 512 bytes; the inputs themselves are a megabyte at most
            raise AssertionError(f"wrote {blocks} blocks")
        for path in (box / "data").rglob("*"):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise AssertionError(f"left a link or a device: {path}")


class BetonReader(Reader):
    """A prepared folder. Inputs are JSON: which folder, its dataset.json, and edits of the training file.

    An edit is [table, field, row, value] or [offset, byte]. Most of such a file is empty, so that changes of its bytes
    would seldom meet anything. "auto" stands for the right checksum.
    """

    may = ("pickle.find_class",)  # Numba's, of what it compiles
    seconds = 10.0  # numba compiles for every size of images

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # of checksums, which no test nor fuzzer is to share
        self.pristine: dict[str, tuple[dict[str, Any], bytes, bytes]] = {}
        for split in ("train", "test"):
            for c in range(2):
                (place := folder / "images" / split / f"class{c}").mkdir(parents=True)
                for n in range(3):
                    Image.fromarray(np.full((16, 16, 3), 40 * n + c, np.uint8)).save(place / f"{n}.png")
        for mode in ("raw", "jpg"):
            made = prepare(folder / "images", folder / mode, data_dir=folder / "data", write_mode=mode)
            told = json.loads((made / "dataset.json").read_text())
            told["sha256"]["train"] = "auto"
            self.pristine[mode] = told, (made / "train.beton").read_bytes(), (made / "test.beton").read_bytes()

    def seeds(self) -> list[bytes]:
        return [self._input(mode, told, []) for mode, (told, _, _) in self.pristine.items()]

    @staticmethod
    def _input(mode: str, told: Any, edits: list[Any]) -> bytes:
        return json.dumps({"mode": mode, "dataset": told, "edits": edits}).encode()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        try:
            given = json.loads(data)
            mode, told, edits = given["mode"], given["dataset"], list(given["edits"])
            content = self.pristine[mode][1]
        except Exception:
            return self.seeds()[rng.randrange(2)]
        kind = rng.random()
        if kind < 0.2:
            told = changed_tree(told, rng)
        elif kind < 0.3 and edits:
            del edits[rng.randrange(len(edits))]
        elif kind < 0.5:
            ends = [(0, 600), (len(content) - 600, len(content))]
            edits.append([rng.randrange(*rng.choice(ends)), rng.randrange(256)])
        else:
            table, rows = rng.choice(list(tables(bytearray(content)).items()))
            name, row = rng.choice(rows.dtype.names), rng.randrange(len(rows))
            width = 8 * rows.dtype[name].base.itemsize
            old = int(np.ravel(rows[name][row])[0])
            value = rng.choice(
                (
                    0,
                    1,
                    2,
                    3,
                    255,
                    2**width - 1,
                    2 ** (width - 1),
                    old ^ 1,
                    old + 8,
                    old - 8,
                    old * 2,
                    rng.getrandbits(width),
                )
            )
            edits.append([table, name, row, value % 2**width])
        return self._input(mode, told, edits[-8:])

    def read(self, data: bytes) -> None:
        try:
            given = json.loads(data)
            told, content, test = (
                given["dataset"],
                bytearray(self.pristine[given["mode"]][1]),
                self.pristine[given["mode"]][2],
            )
            self._edit(content, given["edits"])
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"no input of this fuzzer: {error}") from error
        text = json.dumps(told)
        text = text.replace('"auto"', f'"{hashlib.sha256(content).hexdigest()}"')
        self.clean("x")
        for name, data in (("train.beton", content), ("test.beton", test), ("dataset.json", text.encode())):
            self.put(f"x/{name}", bytes(data))
        dataset = load_dataset(self.folder / "x", data_dir=self.folder / "data")
        loader = make_loader(dataset.train, batch_size=4, device="cpu", kind="ffcv")
        for batch in loader.epoch(0):
            if len(batch.images) > 4 or not bool((batch.images >= 0).all() and (batch.images <= 1).all()):
                raise AssertionError("pixels outside [0, 1]")

    @staticmethod
    def _edit(content: bytearray, edits: list[Any]) -> None:
        for edit in edits:
            if len(edit) == 2:
                content[edit[0]] = edit[1]
                continue
            table, name, row, value = edit
            field = tables(content)[table][name]
            view = field[row : row + 1] if field.ndim == 1 else field[row][:1]
            view[...] = value


class MetricsReader(Reader):
    """What a run leaves beside its weights. The first line names the file; "auto" is the right seal or fingerprint."""

    KINDS = ("metrics", "eval", "compare", "state")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.tiny = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)).eval()
            self.data = torch.rand(6, 1, 2, 2), torch.arange(6) % 5
        evaluate(self.tiny, self.data, "apgd-ce", state_dir=folder / "state", progress=False)
        self.state = next((folder / "state").glob("*.json"))
        self.fingerprint = json.loads(self.state.read_text())["fingerprint"]
        attack = {"num_steps": 1}
        self.base: dict[str, Any] = {
            "limit_train": 32, "batch_size": 32, "epochs": 1, "tensorboard": False, "device": "cpu",
            "model": "resnet-small", "dataset": "digits", "threads": 1, "attack": attack,
        }  # fmt: skip
        self.read_compare(None)
        self.run = Run(next((folder / "compared").glob("standard*/")))
        evaluate(self.tiny, self.data, "clean,pgd-1", progress=False).save(self.run.evaluation("last"))

    def seeds(self) -> list[bytes]:
        evaluation = self._open(self.run.evaluation("last").read_bytes())
        compared = self._open(self.run.compared("last").read_bytes())
        rows = self.run.metrics_file.read_bytes()
        return [
            b"metrics\n" + rows * 3, b"metrics\n" + rows + b'{"epoch": 2, "val/clean_acc": 0.5}\n',
            b"eval\n" + evaluation, b"compare\n" + compared,
            b"state\n" + self._open(self.state.read_bytes()),
            b"state\n" + self._open(self.state.read_bytes(), fingerprint="auto"),
        ]  # fmt: skip

    @staticmethod
    def _open(data: bytes, **auto: str) -> bytes:
        return json.dumps(json.loads(data) | {"sha256": "auto"} | auto).encode()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        kind, _, content = data.partition(b"\n")
        lines = content.split(b"\n") if kind == b"metrics" else [content]
        at = rng.randrange(len(lines))
        try:
            lines[at] = json.dumps(changed_tree(json.loads(lines[at]), rng)).encode()
        except Exception:
            lines[at] = changed_bytes(lines[at], rng)
        return kind + b"\n" + b"\n".join(lines)

    def read(self, data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        kind = name.decode("latin-1")
        if kind not in self.KINDS:
            raise UserError("no input of this fuzzer")
        if kind != "metrics":
            content = self._sealed(content)
        getattr(self, f"read_{kind}")(content)

    def _sealed(self, content: bytes) -> bytes:
        try:
            tree = json.loads(content)
            if tree.get("fingerprint") == "auto":
                tree["fingerprint"] = self.fingerprint
            if tree["sha256"] == "auto":
                return json.dumps(tree | {"sha256": seal(tree)}).encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
        return content

    def read_metrics(self, content: bytes) -> None:
        self.run.metrics_file.write_bytes(content)
        self.run.metrics()
        self.run.last_validation()
        self.run.truncate_metrics(1)

    def read_eval(self, content: bytes) -> None:
        self.run.evaluation("last").write_bytes(content)
        for found in self.run.evaluations().values():
            self.run.stale("last", found)

    def read_state(self, content: bytes) -> None:
        self.state.write_bytes(content)
        evaluate(self.tiny, self.data, "apgd-ce", state_dir=self.state.parent, progress=False)

    def read_compare(self, content: bytes | None) -> None:
        if content is not None:
            self.run.compared("last").write_bytes(content)
        # What it says of a file that it evaluates anew is not wanted here.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            compare(
                ["standard"], [0], out=self.folder / "compared", base=self.base, attack="clean", limit=8, progress=False
            )


READERS: dict[str, Callable[[Path], Reader]] = {
    "config": ConfigReader,
    "checkpoint": CheckpointReader,
    "safetensors": SafetensorsReader,
    "archive": ArchiveReader,
    "beton": BetonReader,
    "metrics": MetricsReader,
}
