"""The command line: parse, call one function, exit code. 0 done, 1 stopped while running, 2 a mistake to mend."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastarat.errors import UserError, nearest
from fastarat.flags import Parser, early
from fastarat.interrupts import Interrupted
from fastarat.texts import any_encoding, printable

_AFTER_YOU_S = 5.0
# What an interrupted command leaves, and how to go on.
_INTERRUPTED = {
    "train": "nothing was begun, and the same command starts again",
    "eval": "AutoAttack's finished batches are kept, and the same command goes on after them; nothing else was written",
    "compare": "finished and begun runs are kept: the same command goes on from there",
    "ablate": "finished and begun runs are kept: the same command goes on from there",
    "report": "a page that was finished before stays; the same command writes it anew",
    "import": "the same command starts again, once the folder it may have begun (--out) is deleted",
    "data": "of image files, those written so far are kept beside --out, and the same command goes on after them",
    "bench": "defenses that were finished are in the file named with --out; the same command starts again",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code; prints a person's mistake as one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with any_encoding(), warnings.catch_warnings():
        # One line for people, without the file and the line of code that Python puts before it.
        warnings.showwarning = _warn
        return _main(argv)


def _warn(message: Warning | str, category: type[Warning], *where: Any) -> None:
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, one warns
        return
    kind = "warning" if category is UserWarning else category.__name__
    print(f"{kind}: {printable(str(message))}", file=sys.stderr)


def _main(argv: list[str]) -> int:
    try:
        return _dispatch(argv)
    except UserError as error:
        if _speaks(error):
            print(f"fastarat: {printable(str(error), chr(10))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        text = f"interrupted; {_kept(argv[0] if argv else '')}"
        if isinstance(error, Interrupted) and argv[:1] == ["train"]:
            text = printable(str(error))
        with contextlib.suppress(OSError):  # the terminal may be gone, which is what SIGHUP says
            if _speaks(error):
                print(f"fastarat: {text}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, Interrupted) else 130  # 128 + SIGINT, as shells have it
    except BrokenPipeError:  # its output went into `head`, say: what was read was enough
        return 1


def _speaks(error: BaseException) -> bool:
    """Whether an error is said here: of the processes that torchrun started, in the one that fails first."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from fastarat.distributed import heard

    speaks = heard(error)
    if not speaks and not hasattr(error, "silent"):
        # Before they met, all fail alike; the launcher ends all once one has ended, so the speaker must have spoken.
        time.sleep(_AFTER_YOU_S)
    return speaks


def _kept(command: str) -> str:
    return _INTERRUPTED.get(command, "nothing was written; the same command starts again")


def _dispatch(argv: list[str]) -> int:
    commands = {
        "train": (_train, "train a network (default: AR-AT on digits)"),
        "eval": (_eval, "clean, PGD and AutoAttack accuracy of a run or checkpoint"),
        "compare": (_compare, "train and evaluate several defenses and seeds, and write one table"),
        "ablate": (_ablate, "AR-AT's stop-gradient and split BatchNorm on and off, with gradient similarity"),
        "report": (_report, "curves, example images and tables of runs, as HTML with PNGs"),
        "import": (_import, "turn a released checkpoint (AR-AT, TRADES, MART, ...) into a run folder"),
        "export": (_export, "write one BatchNorm branch of a run as an ordinary network, checked against the run"),
        "data": (_data, "describe a data set, or write it as .beton"),
        "bench": (_bench, "how fast a training step is on this machine, on random images"),
        "doctor": (_doctor, "what this machine will use, and why not the rest"),
    }
    if not argv or argv[0].startswith("-"):
        return _top(argv, {name: text for name, (_, text) in commands.items()})
    name, rest = argv[0], argv[1:]
    if name not in commands:
        raise UserError(f"unknown command {name!r}{nearest(name, commands) or '.'} Known: {', '.join(commands)}.")
    run, text = commands[name]
    # Before PyTorch, which imports it from C and there swallows a Ctrl-C: the next import of it would then fail.
    import numpy  # noqa: F401

    if name not in ("doctor", "eval", "train") and not {"-h", "--help"} & set(rest):
        # Commands import for themselves, here and below: PyTorch takes seconds, which --version need not spend.
        from fastarat.distributed import one_process

        one_process(f"fastarat {name}")
    parser = Parser(prog=f"fastarat {name}", description=text[0].upper() + text[1:] + ".")
    if name in ("train", "compare", "ablate"):  # they end where nothing is lost, and say so themselves
        return run(parser, rest)
    from fastarat.children import terminable

    with terminable(_kept(name)):
        return run(parser, rest)


def _top(argv: list[str], texts: dict[str, str]) -> int:
    """Answer `fastarat`, `fastarat --help` and `fastarat --version`, for which nothing heavy is imported."""
    from fastarat import __version__

    known = "\n".join(f"  {name:<8} {text}" for name, text in texts.items())
    parser = Parser(
        prog="fastarat",
        description="Fast, faithful adversarial training, built around AR-AT.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{known}\n\nfastarat COMMAND --help shows a command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"fastarat {__version__}")
    parser.parse(argv)
    parser.print_help()
    return 0


def _train(parser: Parser, argv: list[str]) -> int:
    from fastarat import config as c
    from fastarat.defenses.naming import is_code, same_code
    from fastarat.training import train

    parser.add_argument("--config", metavar="FILE", help="YAML with the same names; flags win over it")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder after its last checkpoint")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    # Read before the parser is complete: the defense, named in the file or on the line, decides which flags exist.
    file = early(argv, "--config")
    from_file = c.read_yaml(file) if file else {}
    named = early(argv, "--defense")
    saved, settings = c.named_defense(from_file.get("defense", {}), file or "flags")
    if not named and is_code(saved):
        raise UserError(
            f"{file}: its defense {saved} is code, which runs only where the command line names it: if you trust that "
            f"file, add --defense {saved}"
        )
    if named and is_code(saved) and same_code(named, saved):
        from_file["defense"] = {"name": named, **settings}  # one class, whichever way its path is written
    kind = c.resolve_defense(named or saved)
    args, flags = parser.parse_fields(argv, c.Config, kind)
    given = c.nest(flags)
    if args.resume and from_file:
        raise UserError("--resume uses the run's saved config: leave --config out")
    if args.resume:
        result = train(resume=args.resume, overrides=given, progress=not args.quiet)
    else:
        result = train(c.from_dict(c.merge(from_file, given), source=file or "flags"), progress=not args.quiet)
    if os.environ.get("RANK", "0") == "0" and not args.quiet:
        print(f"done: {result.run}. Next: fastarat eval {result.run} --attack clean,pgd-20,autoattack")
    return 0


def _eval(parser: Parser, argv: list[str]) -> int:
    from fastarat.evaluating import run

    return run(parser, argv)


def _compare(parser: Parser, argv: list[str]) -> int:
    from fastarat import config as c
    from fastarat.compare import compare
    from fastarat.sweep import read_sweep
    from fastarat.tuning import parse_tune
    from fastarat.values import coerce

    parser.add_argument("--defenses", help="comma-separated, of " + ", ".join(c.DEFENSES) + ", or "
                        "FILE.py:CLASS; NAME+swa averages weights")  # fmt: skip
    parser.add_argument(
        "--sweep", metavar="FILE", help="YAML of lists, such as optim.lr: [0.1, 0.05], whose every combination is a "
        "row; `defense` there, or --defenses"
    )  # fmt: skip
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--test-attack", default="clean,pgd-20,autoattack", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="evaluate on this many test images")
    parser.add_argument("--parallel", type=int, default=1, help="trainings and evaluations at once (default: 1)")
    parser.add_argument(
        "--tune", action="append", default=[], metavar="NAME=V,V", help="choose a row's settings on validation images: "
        "optim.lr=0.03,0.1 for every row, ar-at:defense.gamma=5,30 for one; may be repeated"
    )  # fmt: skip
    parser.add_argument("--tune-seeds", default="100,101,102", help="seeds for tuning (default: %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="YAML common to all runs; flags win over it")
    args, flags = parser.parse_fields(argv, c.Config)
    for name in ("seed", "defense.name"):
        if name in flags:
            raise UserError(f"compare takes --{name.removesuffix('.name')}s, a comma-separated list")
    base = c.merge(c.read_yaml(args.config) if args.config else {}, c.nest(flags))
    seeds, tune_seeds = (
        [coerce(seed, int, name, "flags") for seed in text.split(",")]
        for name, text in (("--seeds", args.seeds), ("--tune-seeds", args.tune_seeds))
    )
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected 1 or more")
    out = coerce(base.pop("out", None), str | None, "out", args.config or "flags")
    defenses = [d.strip() for d in args.defenses.split(",")] if args.defenses else None
    if defenses is None and not args.sweep:
        raise UserError("compare needs --defenses at,trades,..., or --sweep FILE")
    if args.sweep and args.tune:
        raise UserError("--tune chooses among values, and --sweep makes a row of each: give one of them")
    rows = read_sweep(args.sweep, defenses, flags) if args.sweep else None
    table = compare(
        defenses or [] if rows is None else list(rows), seeds, base=base, out=out or "runs/compare",
        attack=args.test_attack, limit=args.limit, parallel=args.parallel, tune=parse_tune(args.tune),
        tune_seeds=tune_seeds, rows=rows,
    )  # fmt: skip
    print("\n" + table.markdown())
    print(f"saved: {table.out}/table.md, .tex, .csv, .json")
    return 0


def _ablate(parser: Parser, argv: list[str]) -> int:
    from fastarat import config as c
    from fastarat.ablation import FACTORS, ablate
    from fastarat.defenses import ARAT
    from fastarat.values import coerce

    parser.add_argument("--factors", default="stop-gradient,split-bn", help=f"comma-separated, of {', '.join(FACTORS)} "
                        "(default: %(default)s, the paper's)")  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--test-attack", default="clean,pgd-20,autoattack", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="evaluate on this many test images")
    parser.add_argument("--parallel", type=int, default=1, help="trainings and evaluations at once (default: 1)")
    parser.add_argument("--config", metavar="FILE", help="YAML common to all runs; flags win over it")
    args, flags = parser.parse_fields(argv, c.Config, ARAT)
    if "seed" in flags:
        raise UserError("ablate takes --seeds, a comma-separated list")
    base = c.merge(c.read_yaml(args.config) if args.config else {}, c.nest(flags))
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: expected 1 or more")
    out = coerce(base.pop("out", None), str | None, "out", args.config or "flags")
    table = ablate(
        [coerce(seed, int, "--seeds", "flags") for seed in args.seeds.split(",")], base=base, attack=args.test_attack,
        factors=[name.strip() for name in args.factors.split(",")], out=out or "runs/ablate", limit=args.limit,
        parallel=args.parallel,
    )  # fmt: skip
    print("\n" + table.markdown())
    print(f"saved: {table.out}/table.md, .tex, .csv, .json")
    return 0


def _report(parser: Parser, argv: list[str]) -> int:
    from fastarat.report import report
    from fastarat.report.watch import watch

    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", help="folder to write (default: report/ in the first run)")
    parser.add_argument("--images", type=int, default=8, help="test images in the grid (default: 8)")
    parser.add_argument("--data-dir", help="default: the run's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--watch", action="store_true", help="write it again as the runs go on, until they are finished"
    )
    parser.add_argument("--every", type=float, help="with --watch: seconds between two looks (default: 30)")
    args = parser.parse(argv)
    options = {"num_images": args.images, "device": args.device, "data_dir": args.data_dir}
    if args.watch:
        watch(args.runs, args.out, every=30.0 if args.every is None else args.every, **options)
        return 0
    if args.every is not None:
        raise UserError("--every is of --watch, which was not asked: add it, or leave --every out")
    print(f"wrote {report(args.runs, args.out, **options)}")
    return 0


def _import(parser: Parser, argv: list[str]) -> int:
    from fastarat.interchange import import_checkpoint
    from fastarat.runs import Run
    from fastarat.values import coerce

    parser.add_argument("file", help="checkpoint (.pt, .pth, .safetensors); no code in it is run")
    parser.add_argument("--out", required=True, metavar="RUN", help="run folder to make")
    parser.add_argument("--model", help="default: read from the file")
    parser.add_argument("--num-classes", type=int, help="default: read from the file")
    parser.add_argument("--dataset", help="what it was trained on; without it eval needs --dataset")
    parser.add_argument("--epsilon", default="8/255", help="budget it was trained for (default: %(default)s)")
    parser.add_argument("--norm", default="linf", help="linf or l2 (default: linf)")
    parser.add_argument("--mean", help="normalisation before the network, such as 0.4914,0.4822,0.4465")
    parser.add_argument("--std", help="likewise; default: none, or what the file holds")
    parser.add_argument("--prefer", default="auto", metavar="NAME", help="state dict to take, if there are several")
    args = parser.parse(argv)
    numbers = tuple[float, ...]
    where = import_checkpoint(
        args.file, args.out, model=args.model, num_classes=args.num_classes, dataset=args.dataset,
        epsilon=args.epsilon, norm=args.norm,
        mean=coerce(args.mean, numbers, "--mean", "flags") if args.mean else None,
        std=coerce(args.std, numbers, "--std", "flags") if args.std else None, prefer=args.prefer,
    )  # fmt: skip
    print(Run(where).card_file.read_text(encoding="utf-8"), end="")
    data = "" if args.dataset else " --dataset NAME"
    print(f"done: {where}. Next: fastarat eval {where}{data} --attack clean,pgd-20")
    return 0


def _export(parser: Parser, argv: list[str]) -> int:
    from fastarat.interchange import FORMATS, TOLERANCE, export
    from fastarat.runs import WEIGHTS, Run

    parser.add_argument("run", help="run folder or checkpoint (.safetensors, .pt)")
    parser.add_argument("--format", default="safetensors", help=f"{', '.join(FORMATS)} (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="default: WEIGHTS-BRANCH.* in export/ beside the weights")
    parser.add_argument("--branch", default="adv", help="BatchNorm branch (default: adv, as published numbers)")
    parser.add_argument("--weights", default="last", choices=WEIGHTS, help="default: last")
    parser.add_argument("--images", type=int, default=1000, help="robustbench: test images to check (default: 1000)")
    parser.add_argument("--data-dir", help="robustbench: default: the run's")
    args = parser.parse(argv)
    run = Path(args.run)
    name = f"{args.weights if run.is_dir() else run.stem}-{args.branch}"
    name += "-robustbench" if args.format == "robustbench" else ""
    folder = Run.holding(run).path / "export"
    where = export(
        run, args.out or folder / f"{name}{FORMATS.get(args.format, '')}", format=args.format, branch=args.branch,
        which=args.weights, num_images=args.images, data_dir=args.data_dir,
    )  # fmt: skip
    print(f"wrote {where}: read back, its logits are the run's within {TOLERANCE:g} of the largest")
    if args.format == "robustbench":
        print(f"wrote {where.with_suffix('.md')}: the entry; fill in what it says")
    return 0


def _data(parser: Parser, argv: list[str]) -> int:
    from fastarat.data import info, prepare

    parser.add_argument("action", choices=("info", "prepare"), help="info: describe; prepare: write .beton with FFCV")
    parser.add_argument("dataset", help="name, image folder, archive or .beton folder")
    parser.add_argument("--out", help="folder to write (prepare)")
    parser.add_argument("--data-dir", default="data", help="downloads and caches (default: data)")
    parser.add_argument("--write-mode", default="raw", help="raw (lossless), jpg or proportion (default: raw)")
    parser.add_argument("--jpeg-quality", type=int, default=90, help="1 to 100 (default: 90)")
    parser.add_argument("--jpeg-share", type=float, default=0.5, help="proportion: of the images (default: 0.5)")
    parser.add_argument("--image-size", type=int, help="resize image folders to this many pixels")
    parser.add_argument("--max-resolution", type=int, help="cap of the longer side; images keep sizes of their own")
    parser.add_argument("--workers", type=int, help="threads (prepare; default: the cores, at most 16)")
    parser.add_argument("--quiet", action="store_true", help="say nothing of the progress (prepare)")
    parser.add_argument("--verify", action="store_true", help="read every file in full against its checksum (info)")
    args = parser.parse(argv)
    if args.action == "info":
        told = info(args.dataset, data_dir=args.data_dir, image_size=args.image_size, verify=args.verify)
        print(json.dumps(told, indent=2))
        return 0
    if not args.out:
        raise UserError("data prepare needs --out FOLDER, where train.beton and test.beton go")
    where = prepare(
        args.dataset, args.out, data_dir=args.data_dir, write_mode=args.write_mode, image_size=args.image_size,
        jpeg_quality=args.jpeg_quality, jpeg_share=args.jpeg_share, max_resolution=args.max_resolution,
        workers=args.workers, progress=not args.quiet,
    )  # fmt: skip
    varying = json.loads((where / "dataset.json").read_text())["format"] == 2
    print(f"wrote {where}. Next: fastarat train --dataset {where}" + (" --image-size 224" if varying else ""))
    return 0


def _bench(parser: Parser, argv: list[str]) -> int:
    from fastarat import config as c
    from fastarat.bench import BenchConfig, bench, render, write_record

    name = early(argv, "--defense") or BenchConfig.defense
    kind = None if "," in name else c.resolve_defense(name)
    parser.add_argument("--out", metavar="FILE", help="JSON to write, every sample included")
    args, flags = parser.parse_fields(argv, BenchConfig, kind)
    own = {key.removeprefix("defense."): flags.pop(key) for key in list(flags) if key.startswith("defense.")}
    record = bench(
        c.from_dict(c.nest(flags), BenchConfig, source="flags"),
        None if kind is None else [c.from_dict(own, kind, "defense.")],
        command=shlex.join(["fastarat", "bench", *argv]),
        on_result=lambda record: write_record(record, Path(args.out)) if args.out else None,
    )
    print(render(record))
    if args.out:
        print(f"saved: {args.out}")
    return 0


def _doctor(parser: Parser, argv: list[str]) -> int:
    from fastarat.device import pick_device
    from fastarat.doctor import diagnose, render

    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    args = parser.parse(argv)
    print(render(diagnose(pick_device(args.device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
