"""ARREST: finetune a standard network adversarially and keep its clean representations where they were."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastarat.ascent import Attacked, draw_start
from fastarat.defenses.base import Defense, Forward, Passes, Settings, Views, network_dtype, part_of
from fastarat.errors import UserError
from fastarat.losses import angular_distance, wide
from fastarat.nets.models import Network
from fastarat.nets.taps import PENULTIMATE, Taps, forward_with_features


class Frozen(nn.Module):
    """The standard network, forever in eval mode and without gradients; lam is kept beside it on the device.

    forward: images float32 [B, C, H, W] -> penultimate features float [B, d].
    """

    lam: Tensor

    def __init__(self, network: nn.Module, lam: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("lam", torch.tensor(float(lam), dtype=network_dtype(network)))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        taps = Taps((PENULTIMATE,))
        forward_with_features(self.network, images, taps)
        return taps.ordered()[0]


@dataclass(frozen=True, kw_only=True)
class ARREST(Defense):
    """Minimise CE(f(x^), y) + lam mean angle(z(x^), z_std(x)), f starting from the standard network z_std belongs to.

    Noisy replay: x^ is the adversarial image, or x plus uniform noise for an image whose clean representation has
    turned by more than phi from the standard one. Every image is attacked and the choice made on the device: leaving
    the replayed ones out would make the host wait and the shapes vary.

    With a `TrainStep` of your own, load the standard network first: `fastarat.runs.load_start(defense, model)`.

    Source: Suzuki et al., ICCV 2023 (arXiv 2308.16454), without public code.
    """

    name: ClassVar[str] = "arrest"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    starts_from: ClassVar[str] = "teacher"
    regularizers: ClassVar[tuple[str, ...]] = ("angle",)
    formula: ClassVar[str] = "CE(f(x^), y) + lam angle(z(x^), sg z_std(x)), x^ = x' or (noisy replay) x + noise"

    teacher: str | None = field(
        default=None,
        metadata={"help": "run folder or checkpoint of a `standard` run: frozen teacher and start of the student"},
    )
    lam: float | None = field(
        default=None,
        metadata={"help": "weight of the angle (default: the network's, 30; 100 for WRN)", "range": "[0, inf)"},
    )
    phi: float | None = field(
        default=30.0,
        metadata={
            "help": "degrees a clean representation may turn before noisy replay; none: no replay",
            "range": "[0, 180]",
        },
    )
    nr_batch: bool = field(
        default=False,
        metadata={"help": "replay the whole batch, or none of it, by the share that has turned"},
    )
    tau: float = field(
        default=0.5,
        metadata={"help": "with nr_batch, share of turned images above which the batch is replayed", "range": "[0, 1]"},
    )

    def start_kind(self, norm: str) -> str:
        if norm == "l2" and self.phi is not None:
            raise UserError(
                "arrest's noisy replay draws from the L-infinity ball: with --attack.norm l2 write --defense.phi none"
            )
        return super().start_kind(norm)

    def equals_default(self, run: Settings) -> dict[str, object]:
        return {"defense.lam": 100.0 if run.model.startswith("wrn") else 30.0}

    def departures(self, run: Settings) -> tuple[str, ...]:
        return (
            *super().departures(run),
            "no code is public: lam, phi, tau, the replay test, the attack's BatchNorm mode and the schedule are our "
            "choices (--defense.lam, --defense.phi, --defense.nr-batch, --attack.bn, --optim.recipe)",
        )

    def describe(self, norm: str) -> dict[str, str]:
        if self.phi is None:
            replay = "off"
        elif self.nr_batch:
            replay = f"the batch, when over {self.tau:g} of it has turned by more than {self.phi:g} degrees"
        else:
            replay = f"images turned by more than {self.phi:g} degrees"
        return {**super().describe(norm), "standard network": str(self.teacher), "noisy replay": replay}

    def passes(self) -> Passes:
        return Passes(1 if self.phi is None else 2, 1, 1)  # noisy replay looks at the clean representations

    def companions(self, model: nn.Module, example: Tensor) -> nn.ModuleDict:
        lam = self.lam
        if lam is None:
            lam = model.invariance_weight if isinstance(model, Network) else 30.0
        return nn.ModuleDict({"teacher": Frozen(copy.deepcopy(model), lam)})

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        teacher, inputs = part_of(companions, "teacher", Frozen), attacked.images
        with torch.no_grad():
            z_std = run.companion(teacher, images)
            if self.phi is not None:
                _, (z_clean,) = run(images, "adv", layers=(PENULTIMATE,), training=False)
                turned = angular_distance(z_clean, z_std) * 180 > self.phi
                if self.nr_batch:
                    mean = torch.Tensor.mean if run.batch_mean is None else run.batch_mean
                    turned = (mean(turned.float()) > self.tau).expand_as(turned)
                noisy = draw_start(images, epsilon=run.epsilon, kind="uniform", generator=run.generator)
                inputs = torch.where(turned[:, None, None, None], noisy, inputs)
        logits, (z,) = run(inputs, "adv", layers=(PENULTIMATE,))
        return run.views(
            labels, logits_adv=logits, features_adv=(z,), features_clean=(z_std,), extra={"lam": teacher.lam}
        )

    def loss(self, views: Views) -> dict[str, Tensor]:
        (z,), (z_std,) = views.features_adv, views.features_clean
        return {
            "ce_adv": F.cross_entropy(wide(views.logits_adv), views.targets),
            "angle": views.extra["lam"] * angular_distance(z, z_std.detach()).mean(),
        }
