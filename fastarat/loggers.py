"""Where epochs are logged beside metrics.jsonl and TensorBoard: a CSV file, Weights & Biases, MLflow; all callbacks.

None of them ends a training or changes a number of it: what fails warns once, and is tried again at the end.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastarat.callbacks import Callback, Hooks, Running, alone, checked
from fastarat.card import best_by
from fastarat.config import Config, to_dict
from fastarat.errors import UserError
from fastarat.files import parse_json, write_text
from fastarat.results import Result
from fastarat.values import flat


def hooks_of(config: Config, callbacks: Iterable[Callback], agree: Callable[[Callable[[], Any]], Any] = alone) -> Hooks:
    """Return the hooks of a training: the loggers its config asks for, then the person's own callbacks.

    agree: as `Hooks` takes it. Raises: UserError where a package or a key is missing; for what is no callback.
    """
    found: list[Callback] = []
    agree(lambda: found.extend([*_loggers(config), *checked(callbacks)]))
    return Hooks(found, agree)


def _loggers(config: Config) -> list[Callback]:
    return [_LOGGERS[name]() for name in dict.fromkeys(config.loggers or ())]


class _Logger(Callback):
    """Rows of epochs to somewhere else, each once, across resumes too.

    What a subclass's `begin` returns is kept in the run folder, with the last epoch that was sent, and given to
    `begin` when the run goes on.
    """

    name = ""

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None
        self._sent, self._warned = 0, False

    def begin(self, run: Running, kept: dict[str, Any]) -> dict[str, Any]:
        """Open, or go on with what was `kept`; return what is to be kept."""
        raise NotImplementedError

    def send(self, rows: list[dict[str, Any]]) -> None:
        """Log rows of epochs."""
        raise NotImplementedError

    def end(self, summary: dict[str, Any], how: str) -> None:
        """Close. summary: of the whole run. how: "finished", "interrupted" or "failed"."""
        raise NotImplementedError

    def on_start(self, run: Running) -> None:
        with self._unharmed():
            self._open(run)

    def on_epoch(self, run: Running, row: dict[str, Any]) -> None:
        # Not again after a failure: each attempt may wait minutes for a server that is gone, and so would the training.
        if not self._warned:
            with self._unharmed():
                self._open(run)

    def on_end(self, run: Running, outcome: Result | BaseException) -> None:
        how = "finished"
        if not isinstance(outcome, Result) or outcome.stopped is not None:
            how = "interrupted" if isinstance(outcome, Result | KeyboardInterrupt) else "failed"
        with self._unharmed():
            self._open(run)
            self.end(summary_of(run), how)

    def _open(self, run: Running) -> None:
        """Begin if need be, and send what was not sent yet."""
        file = run.folder / f"{self.name}.json"
        if self._kept is None:
            kept = _read(file) if run.resumed else {}
            self._kept = self.begin(run, kept)
            # Another run than the one before: it gets every row.
            self._sent = kept.get("epoch", 0) if kept.get("id") == self._kept.get("id") else 0
        rows = [row for row in run.metrics if row["epoch"] > self._sent]
        if rows:
            self.send(rows)
            self._sent = rows[-1]["epoch"]
        write_text(file, json.dumps({**self._kept, "epoch": self._sent}) + "\n")

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Let nothing that a logger does reach the training: no error, no global generator, no environment."""
        streams, environment = (random.getstate(), np.random.get_state()), dict(os.environ)
        try:
            yield
        except Exception as error:
            if not self._warned:
                said = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"logging to {self.name} failed ({type(error).__name__}: {said}); the training goes on without it, "
                    "it is tried again at the end, and metrics.jsonl has every epoch",
                    stacklevel=2,
                )
            self._warned = True
        finally:
            random.setstate(streams[0])
            np.random.set_state(streams[1])
            if os.environ != environment:
                os.environ.clear()
                os.environ.update(environment)


def summary_of(run: Running) -> dict[str, Any]:
    """The last and the best epoch's validation accuracies, by `last/NAME` and `best/NAME`; what there is of them."""
    found: dict[str, Any] = {"epochs": run.epoch}
    # A Result that nobody is given: it knows which epoch is best.
    result = Result(run.folder, run.metrics, run.model, run.config)
    for which, row in (("last", result.last or {}), ("best", result.best or {})):
        for name in best_by(run.config):
            if (value := row.get(f"val/{name}")) is not None:
                found |= {f"{which}/epoch": row["epoch"], f"{which}/{name}": value}
    return found


class CSV(Callback):
    """metrics.csv beside metrics.jsonl, one line per epoch, for spreadsheets."""

    def __init__(self) -> None:
        self._warned = False

    def on_start(self, run: Running) -> None:
        if run.metrics:
            self.on_epoch(run, run.metrics[-1])

    def on_epoch(self, run: Running, row: dict[str, Any]) -> None:
        # Written anew, whole: an epoch may have other columns than the first, and a resumed run has fewer lines.
        text = io.StringIO()
        columns = list(dict.fromkeys(key for one in run.metrics for key in one))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.metrics)
        try:
            write_text(run.folder / "metrics.csv", text.getvalue())
        except UserError as error:
            if not self._warned:
                warnings.warn(f"{error}; the training goes on, and metrics.jsonl has every epoch", stacklevel=2)
            self._warned = True


class WandB(_Logger):
    """Weights & Biases. Project, entity, mode and all else by its own variables; the project is fastarat by default."""

    name = "wandb"

    def __init__(self) -> None:
        super().__init__()
        self._wandb = _imported("wandb", "init")
        self._run: Any = None
        if os.environ.get("WANDB_MODE", "online") != "online":
            return
        try:
            there = self._wandb.login(prompt=False)
        except TypeError:  # versions that only know how to ask
            return
        except Exception as error:
            raise UserError(f"loggers=wandb: {' '.join(str(error).split())[:300]}{_OFFLINE}") from error
        if not there:
            raise UserError(f"loggers=wandb: no API key is configured{_OFFLINE}")

    def begin(self, run: Running, kept: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"id": kept["id"]} if "id" in kept else {}
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fastarat",
            name=os.environ.get("WANDB_NAME") or run.folder.name,
            dir=str(run.folder),
            config=to_dict(run.config),
            notes=run.card,
            resume="allow",
            reinit="create_new",  # a run that the person's own code has open stays theirs
            allow_val_change=True,  # a resumed run may have more epochs
            settings=self._settings(),
            **options,
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        if run.progress and not self._run.offline and self._run.url:
            print(f"wandb: {self._run.url}", flush=True)
        return {"id": self._run.id}

    def _settings(self) -> Any:
        kind = self._wandb.Settings
        # Without one it would wait for a server that is gone for ever; older versions know none.
        known = "finish_timeout" in getattr(kind, "model_fields", {})
        return kind(console="off", silent=True, **({"finish_timeout": _PATIENCE_S} if known else {}))

    def send(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._run.log(row, step=row["epoch"])

    def end(self, summary: dict[str, Any], how: str) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(how != "finished"))


class MLflow(_Logger):
    """MLflow, by its client alone: no run becomes the active one of the process.

    Server and experiment by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME; the experiment is fastarat by default.
    """

    name = "mlflow"
    _MOST = 100  # entries of a batch, by the protocol

    def __init__(self) -> None:
        super().__init__()
        self._mlflow = _imported("mlflow", "MlflowClient")
        self._client: Any = None
        self._id = ""

    def begin(self, run: Running, kept: dict[str, Any]) -> dict[str, Any]:
        self._client = client = self._mlflow.MlflowClient()
        self._id, logged = str(kept.get("id", "")), {}
        if self._id:
            try:
                logged = client.get_run(self._id).data.params
                client.update_run(self._id, status="RUNNING")
            except self._mlflow.exceptions.MlflowException:  # deleted, or the server is another now
                self._id = ""
        if not self._id:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fastarat"
            found = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name) if found is None else found.experiment_id
            self._id = client.create_run(experiment, run_name=run.folder.name).info.run_id
        # What was logged cannot change; a run that was extended says so in config.yaml.
        params = [(key, str(value)[:500]) for key, value in flat(to_dict(run.config)) if key not in logged]
        entities = self._mlflow.entities
        for at in range(0, len(params), self._MOST):
            batch = [entities.Param(key, value) for key, value in params[at : at + self._MOST]]
            client.log_batch(self._id, params=batch)
        client.log_text(self._id, yaml.safe_dump(to_dict(run.config), sort_keys=False), "config.yaml")
        client.log_text(self._id, run.card + "\n", "card.txt")
        return {"id": self._id}

    def send(self, rows: list[dict[str, Any]]) -> None:
        metric, now = self._mlflow.entities.Metric, _milliseconds()
        values = [
            metric(key, float(value), now, row["epoch"]) for row in rows for key, value in row.items() if key != "epoch"
        ]
        for at in range(0, len(values), self._MOST):
            self._client.log_batch(self._id, metrics=values[at : at + self._MOST])

    def end(self, summary: dict[str, Any], how: str) -> None:
        metric, now = self._mlflow.entities.Metric, _milliseconds()
        epoch = summary["epochs"]
        self._client.log_batch(self._id, metrics=[metric(k, float(v), now, epoch) for k, v in summary.items()])
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[how]
        self._client.set_terminated(self._id, status=status)


_PATIENCE_S = 600.0
_OFFLINE = ": run `wandb login`, set WANDB_MODE=offline (`wandb sync` sends it later), or leave the logger out"
_LOGGERS: dict[str, Callable[[], Callback]] = {"csv": CSV, "wandb": WandB, "mlflow": MLflow}


def _imported(package: str, needs: str) -> Any:
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"loggers={package}: it does not import ({error}): pip install 'fastarat[{package}]', or leave it out"
        ) from error
    if not hasattr(module, needs):  # a folder of logs with that name is a package too, an empty one
        raise UserError(
            f"loggers={package}: the package is not installed, and a folder {package}/ stands for it here: "
            f"pip install 'fastarat[{package}]', or leave it out"
        )
    return module


def _milliseconds() -> int:
    return int(1000 * time.time())


def _read(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_bytes())
        return found if isinstance(found, dict) and isinstance(found.get("epoch"), int) else {}
    except (OSError, ValueError):  # none yet, or damaged: the logger begins anew
        return {}
