"""Faults planted in a training step that is counted on fake CUDA tensors; a process of its own (`test_structure.py`).

Prints JSON: for each plant the record of the step, or the error that ended it; of single operations their launches.
"""

import json
import sys
from contextlib import contextmanager
from unittest import mock

from benchmarks import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import torch
import torch.nn.functional as F

from benchmarks import launches, structure
from fastarat import kernels
from fastarat.defenses import Standard
from fastarat.nets.models import BasicBlock


class Reading(Standard):
    def loss(self, views):
        terms = super().loss(views)
        if terms["ce_clean"] > 100:
            terms["ce_clean"] = terms["ce_clean"] * 0
        return terms


class Counting(Standard):
    def loss(self, views):
        wrong = (views.logits_clean.argmax(1) != views.labels).nonzero()
        return {"ce": super().loss(views)["ce_clean"] * len(wrong)}


class Copying(Standard):
    def loss(self, views):
        terms = super().loss(views)
        terms["ce_clean"].detach().cpu()
        return terms


class Uploading(Standard):
    def loss(self, views):
        weight = torch.tensor(0.5, device=views.labels.device)
        return {"ce": super().loss(views)["ce_clean"] * weight}


class Waiting(Standard):
    def loss(self, views):
        torch.cuda.synchronize()
        return super().loss(views)


@contextmanager
def block(change):
    forward = BasicBlock.forward

    def changed(self, x, name, taps):
        return change(forward(self, x, name, taps))

    with mock.patch.object(BasicBlock, "forward", changed):
        yield


def laid_out(x):
    return x.contiguous()


def widened(x):
    return x.float().to(x.dtype)


def record(defense, change=lambda x: x):
    try:
        with structure.pretended(), block(change):
            return structure.record(structure.watched(structure.step_of(defense), 128))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def operation(call):
    with structure.pretended(), structure.Watch() as watch:
        call()
        watch.mark("all")
    return [one._asdict() for one in watch.phases["all"].launches]


def images(channels, dtype=torch.bfloat16):
    return torch.empty(128, channels, 32, 32, device="cuda", dtype=dtype, memory_format=torch.channels_last)


def convolved():
    F.conv2d(images(64), torch.empty(128, 64, 3, 3, device="cuda", dtype=torch.bfloat16), padding=1)


def normalised():
    affine = torch.empty(2, 64, device="cuda")
    kernels.split_bn(images(64), affine, affine, images(64), relu=True)


def unpriced():
    priced = {name: launches.TRITON[name] for name in launches.TRITON if name != "_apply_kernel"}
    with mock.patch.object(launches, "TRITON", priced):
        normalised()


def main():
    found = {
        "clean": record(Standard()),
        "reads": record(Reading()),
        "nonzero": record(Counting()),
        "copies": record(Copying()),
        "uploads": record(Uploading()),
        "waits": record(Waiting()),
        "layout": record(Standard(), laid_out),
        "cast": record(Standard(), widened),
        "convolution": operation(convolved),
        "split_bn": operation(normalised),
    }
    try:
        operation(unpriced)
    except launches.Unpriced as error:
        found["unpriced"] = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
