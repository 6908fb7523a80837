"""`fastarat train`, in which one rank is killed, or sent a signal, after so many steps: RANK:STEPS:SIGNAL."""

import os
import signal
import sys

import fastarat
from fastarat.cli import main

rank, count, name = os.environ["FASTARAT_TEST_KILL"].split(":")
call, done = fastarat.TrainStep.__call__, 0


def counted(self, *args, **options):
    global done
    done += 1
    if done == int(count) and os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), getattr(signal, name))
    return call(self, *args, **options)


fastarat.TrainStep.__call__ = counted
sys.exit(main(["train", *sys.argv[1:]]))
