"""`fastarat eval`: what a run is evaluated on, what is unusual about it, and where the result goes."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastarat import evaluation
from fastarat.card import accuracy_name
from fastarat.config import Config
from fastarat.data import Dataset, load_dataset
from fastarat.distributed import World, joined
from fastarat.errors import UserError
from fastarat.evaluation import Evaluation, check_replaceable, check_writable, in_pixels, keep_previous, parse_attacks
from fastarat.flags import Parser
from fastarat.resuming import finished
from fastarat.runs import WEIGHTS, Run, check_branch, load_network
from fastarat.texts import printable
from fastarat.values import Budget, checked_budget, checked_seed

Say = Callable[[str], None]


def run(parser: Parser, argv: list[str]) -> int:
    """Evaluate as the command line says, write the result and print its table. Returns the exit code.

    Of several processes, torchrun's, each measures its share; the first prints and writes.
    """
    args = _eval_flags(parser, argv)
    with joined(args.device) as world:
        _run(args, world, print if world.first_one else lambda text: None)
    return 0


def _run(args: argparse.Namespace, world: World, say: Say) -> None:
    model, meta, config = load_network(args.run, args.weights)
    check_branch(args.run, meta, args.branch, args.weights if Path(args.run).is_dir() else "")
    budget = _budget(args, meta, say)
    source = None if args.source is None else _source(args.source, meta, args.run, say)
    dataset = _loaded(args, meta, config, world)
    _say_what_is_unusual(args, meta, config, len(dataset.test), say)
    folder = Run.holding(args.run)
    where = Path(args.out) if args.out else folder.evaluation(args.weights)
    world.first(lambda: _check_place(where, meta, args.overwrite))  # before the evaluation, which may take hours
    # A run on a read-only disk is evaluated with --out elsewhere, and AutoAttack's batches are kept beside that.
    state = folder.state_dir if os.access(folder.path, os.W_OK) else where.with_name(f"{where.stem}-state")
    result = evaluation.evaluate(
        model.to(world.device), dataset.test, args.attack, **budget._asdict(), limit=args.limit,
        batch_size=args.batch_size, seed=args.seed, branch=args.branch, state_dir=state, tf32=args.tf32, source=source,
        curves=args.curves, corruptions_dir=args.corruptions_dir, confirm=args.confirm, world=world,
    )  # fmt: skip
    told = {"weights": args.weights, "epoch": meta["epoch"]}
    told |= {"trained_epsilon": meta["epsilon"], "trained_norm": meta["norm"]}
    told |= {} if source is None else {"from_run": str(args.source)}
    told |= {} if args.dataset in (None, config and config.dataset) else {"dataset": dataset.name}
    result = dataclasses.replace(result, settings={**result.settings, **told})
    if kept := world.first(lambda: _write(result, where, args.overwrite)):
        say(f"note: the earlier result there says what this one does not: it is kept as {kept}")
    best = meta.get("best")
    chosen = f", highest validation {accuracy_name(best['by'])}" if best else ""
    of = f"{args.weights}, epoch {meta['epoch']}{chosen}"
    say(printable(f"{meta['defense']}, {meta['model']} ({of}), {dataset.name} test set"))
    say(result.table())
    say(f"saved: {where}")


def _check_place(where: Path, meta: dict[str, Any], overwrite: bool) -> None:
    check_writable(where)
    if not overwrite:
        check_replaceable(where, meta["sha256"])


def _write(result: Evaluation, where: Path, overwrite: bool) -> Path | None:
    """Write the result; return what an earlier one is kept as that says more."""
    kept = None if overwrite else keep_previous(where, result)
    result.save(where)
    return kept


def _loaded(args: argparse.Namespace, meta: dict[str, Any], config: Config | None, world: World) -> Dataset:
    """Load the data on the first rank before the others, who find what it fetched and unpacked."""
    there: list[Dataset] = []
    world.first(lambda: there.append(_data_to_evaluate(args, meta, config)))
    return there[0] if there else _data_to_evaluate(args, meta, config)


def _eval_flags(parser: Parser, argv: list[str]) -> argparse.Namespace:
    parser.add_argument("run", help="run folder or checkpoint (.safetensors, .pt)")
    parser.add_argument("--attack", default="clean,pgd-20", help="comma-separated: clean, pgd-N, pgd-N-R (R restarts), "
                        "cw-N, cw-N-R, autoattack, autoattack-fast, apgd-ce, apgd-t, fab-t, square, transfer (with "
                        "--from), worst (of the list, per image), corruptions (default: %(default)s)")  # fmt: skip
    parser.add_argument("--from", dest="source", metavar="RUN", help="transfer: craft PGD-20 images on this run")
    parser.add_argument("--no-confirm", dest="confirm", action="store_false", help="autoattack-fast: leave out the "
                        "float32 run on what its searches left (labelled unconfirmed)")  # fmt: skip
    parser.add_argument("--curves", action="store_true", help="accuracy along epsilon and PGD steps, too (260 steps)")
    parser.add_argument("--corruptions-dir", metavar="DIR", help="prepared corruptions, as CIFAR-10-C's .npy files")
    parser.add_argument("--weights", default="last", choices=WEIGHTS, help="of a run folder (default: last)")
    parser.add_argument("--epsilon", help="pixel units, such as 8/255 (default: the run's)")
    parser.add_argument("--step-size", help="of PGD, pixel units (default: epsilon / 4)")
    parser.add_argument("--norm", help="linf or l2 (default: the run's)")
    parser.add_argument("--limit", type=int, help="evaluate this many test images, evenly through the set")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--branch", default="adv", help="BatchNorm branch (default: adv, as published numbers)")
    parser.add_argument("--dataset", help="default: the run's")
    parser.add_argument("--data-dir", help="default: the run's")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 (recorded with the result)")
    parser.add_argument("--out", help="JSON to write (default: eval.json in the run folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is not of these weights")
    args = parser.parse(argv)
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: expected 1 or more")
    checked_seed(args.seed)
    names = {entry.name for entry in parse_attacks(args.attack)}
    if args.source is not None and "transfer" not in names:
        args.attack += ",transfer"
    if args.source is None and "transfer" in names:
        raise UserError("the attack transfer needs --from RUN: the run that the images are crafted on")
    if args.corruptions_dir is not None and "corruptions" not in names:
        raise UserError("--corruptions-dir is read by --attack corruptions: name that, too")
    return args


def _budget(args: argparse.Namespace, meta: dict[str, Any], say: Say) -> Budget:
    """What the attacks may do; said aloud where it is not what the run was trained with."""
    epsilon = meta["epsilon"] if args.epsilon is None else args.epsilon
    budget = checked_budget(epsilon, args.step_size, meta["norm"] if args.norm is None else args.norm, where="--")
    if (budget.epsilon, budget.norm) != (meta["epsilon"], meta["norm"]):
        say(
            f"note: evaluated at {budget.norm} epsilon {in_pixels(budget.epsilon)}, trained at {meta['norm']} epsilon "
            f"{in_pixels(meta['epsilon'])}"
        )
    return budget


def _source(path: str, meta: dict[str, Any], run: str, say: Say) -> nn.Module:
    """The network to craft on: of the same classes and image shape."""
    model, theirs, config = load_network(path)
    if theirs["sha256"] == meta["sha256"]:
        say(f"note: --from {path} is this very network: that is PGD-20 on itself, and transfers nothing")
    if config is not None and config.epochs is not None and theirs["epoch"] < config.epochs:
        say(f"note: --from {path} has {theirs['epoch']} of {config.epochs} epochs: it is unfinished")
    for key, what in (("num_classes", "classes"), ("in_channels", "channel(s)"), ("image_size", "pixels a side")):
        if theirs[key] != meta[key]:
            raise UserError(f"--from {path} is of {theirs[key]} {what}, {run} of {meta[key]}: expected the same")
    if theirs.get("classes") != meta.get("classes"):
        raise UserError(f"--from {path} was trained on other classes than {run}: expected the same data set")
    return model


def _say_what_is_unusual(
    args: argparse.Namespace, meta: dict[str, Any], config: Config | None, total: int, say: Say
) -> None:
    if args.limit is not None and args.limit > total:
        say(f"note: --limit {args.limit} is above the {total:,} test images: all of them are evaluated")
    # Of `best` and the averages the epoch says nothing of how far the run has come.
    # An imported run's config names no number of epochs.
    planned = config.epochs if config is not None and args.weights == "last" and not meta.get("best") else None
    early = config is not None and config.early_stop is not None and finished(Run.holding(args.run))
    if planned is not None and meta["epoch"] < planned and not early:
        say(f"note: the run has {meta['epoch']} of {planned} epochs: it is unfinished, and so are its weights")


def _data_to_evaluate(args: argparse.Namespace, meta: dict[str, Any], config: Config | None) -> Dataset:
    name = args.dataset or (config.dataset if config else None)
    if not name:
        raise UserError(f"{args.run} has no config.yaml beside it: name the data set with --dataset")
    dataset = load_dataset(
        name,
        data_dir=args.data_dir or (config.data_dir if config else "data"),
        val_images=config.eval.val_images if config and not args.dataset else None,
        image_size=config.image_size if config else None,
    )
    if len(dataset.classes) != meta["num_classes"] or dataset.shape[0] != meta["in_channels"]:
        raise UserError(
            f"{args.run} was trained for {meta['num_classes']} classes and {meta['in_channels']} channel(s); "
            f"{dataset.name} has {len(dataset.classes)} and {dataset.shape[0]}"
        )
    return dataset
