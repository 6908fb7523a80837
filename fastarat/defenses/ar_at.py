"""AR-AT: asymmetric representation regularisation with split BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastarat.ascent import Attacked, draw_start
from fastarat.defenses.base import Defense, Forward, Settings, Views, network_dtype, part_of
from fastarat.losses import Align, Distance, ar_at_invariance, wide
from fastarat.nets.models import Network, build_model
from fastarat.nets.taps import Taps, forward_with_features, tap_names


class Predictor(nn.Module):
    """Linear(d, d/4, no bias), BatchNorm1d, ReLU, Linear(d/4, d); always in train mode, unused at test.

    forward: float [B, d] -> float [B, d]. Source: Waseda et al., ICLR 2025, released code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, int(0.25 * width))
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Balance(nn.Module):
    """Holds the loss weights a (adversarial), b (clean) and gamma on the device, where a captured step reads them."""

    adv: Tensor
    clean: Tensor
    gamma: Tensor

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.register_buffer("adv", torch.ones(()))
        self.register_buffer("clean", torch.ones(()))
        self.register_buffer("gamma", torch.tensor(float(gamma), dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class ARAT(Defense):
    """L = a CE(f_A(x'), y) + b CE(f_N(x), y) + gamma/|S| sum_l D(h_l(z'_l), sg z_l).

    f_A and f_N share convolutions and classifier and differ in their BatchNorm sets. a = acc^q and b = (1 - acc)^q,
    acc being the clean branch's accuracy on about 1000 augmented training images before each epoch.

    Source: Waseda, Chang and Echizen, ICLR 2025 (arXiv 2402.14648); defaults are the released code's.
    """

    name: ClassVar[str] = "ar-at"
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"
    formula: ClassVar[str] = "a CE(f_A(x'), y) + b CE(f_N(x), y) + gamma/|S| sum_l D(h_l(z'_l), sg z_l)"
    attack_bn: ClassVar[str] = "train"
    under_l2: ClassVar[str] = ""
    needs_clean: ClassVar[bool] = True
    regularizers: ClassVar[tuple[str, ...]] = ("invariance",)

    gamma: float | None = field(
        default=None,
        metadata={"help": "total invariance weight (default: the network's, 30; 100 for WRN)", "range": "[0, inf)"},
    )
    layers: tuple[str, ...] | None = field(
        default=None, metadata={"help": "aligned layers (default: the network's); 'penultimate' for one layer"}
    )
    align: Align = field(
        default="x->y",
        metadata={
            "help": "which features move, x adversarial and y clean: x->y, y->x, the mean of "
            "both, or x<->y (both at once, no stopped gradient)"
        },
    )
    metric: Distance = field(default="cos", metadata={"help": "feature distance"})
    predictor_adv: bool = field(default=True, metadata={"help": "predictor on adversarial features"})
    predictor_clean: bool = field(default=False, metadata={"help": "predictor on clean features"})
    shared_predictor: bool = field(default=False, metadata={"help": "one predictor for both sides"})
    split_bn: bool = field(default=True, metadata={"help": "one BatchNorm set per branch"})
    balance: Literal["auto", "fixed"] = field(
        default="auto", metadata={"help": "a, b from the clean branch's accuracy, or a = b = 1"}
    )
    balance_power: float = field(default=1.0, metadata={"help": "q in a = acc^q, b = (1 - acc)^q", "range": "[0, inf)"})
    center: Literal["noisy", "clean"] = field(
        default="noisy",
        metadata={
            "help": "centre of the attack and input of the clean branch: the image plus uniform noise (released "
            "code, up to 2 epsilon from the image) or the image itself (the paper)"
        },
    )
    relu: bool = field(default=True, metadata={"help": "ReLU on tapped features"})
    pool: bool = field(default=True, metadata={"help": "global average pooling of tapped features"})

    @property
    def splits(self) -> bool:
        return self.split_bn

    def _noisy(self, norm: str) -> bool:
        # The released L2 path goes through a third-party attack that copies its input: no aliasing there.
        return self.center == "noisy" and norm == "linf"

    def start_kind(self, norm: str) -> str:
        if norm == "l2":
            return "l2"
        return "none" if self._noisy(norm) else "uniform-unclamped"

    def bn_mode(self, norm: str) -> str:
        return "eval" if norm == "l2" else self.attack_bn

    def equals_default(self, run: Settings) -> dict[str, object]:
        # timm's, and one given in Python, are not built for this: they have the default weight and penultimate feature.
        model: nn.Module = nn.Identity()
        if ":" not in run.model:
            with torch.device("meta"):
                model = build_model(run.model, num_classes=2, image_size=run.image_size)
        gamma = model.invariance_weight if isinstance(model, Network) else 30.0
        return {"defense.gamma": gamma, "defense.layers": tap_names(model)}

    def departures(self, run: Settings) -> tuple[str, ...]:
        found = super().departures(run)
        budget = math.isclose(run.epsilon, 128 / 255) and math.isclose(run.step_size, 32 / 255)
        if run.norm == "l2" and not budget:
            found += (
                "L2 is the research version's, whose attack runs in eval mode around the image itself, with "
                "epsilon 128/255 and step 32/255; the current release sets neither (--attack.epsilon 128/255 "
                "--attack.step-size 32/255)",
            )
        if run.norm != "l2" and self.center == "clean":
            found += (
                "centre and clean branch are the image itself, as in the paper; in the release the image plus "
                "uniform noise (--defense.center noisy)",
            )
        heads = self.predictor_adv + self.predictor_clean + 2 * self.shared_predictor
        if self.align in ("y->x", "x->y,y->x") and heads:
            found += (
                f"with {self.align} and one predictor the release forgets a stop-gradient, with two it fails in "
                "x->y,y->x: here the target is always stopped and each predictor acts on the side that moves",
            )
        if self.metric == "kl":
            found += ("the release's temperature of the metric kl is not known: 1 is our choice",)
        analogous = self.layers is None or self.layers == self.equals_default(run)["defense.layers"]
        if analogous and run.model not in ("resnet18", "wrn-34-10"):
            found += (
                f"the release aligns layers of ResNet-18 and WRN-34-10; those of {run.model} are chosen by "
                "analogy (--defense.layers)",
            )
        return found

    def describe(self, norm: str) -> dict[str, str]:
        centre = (
            "noisy (x + U(-eps, eps), as released: training images lie up to 2 epsilon from the data, those of an "
            "evaluation within one, unlike in the release's own PGD test)"
            if self._noisy(norm)
            else "clean (x itself, the threat model as written)"
        )
        return {
            **super().describe(norm),
            "center": centre,
            "split BatchNorm": "on (clean, adv)" if self.split_bn else "off (shared)",
        }

    def companions(self, model: nn.Module, example: Tensor) -> nn.ModuleDict:
        layers = self.layers or tap_names(model)
        taps = Taps(layers, self.relu, self.pool)
        mode = model.training
        with torch.no_grad():
            forward_with_features(model.eval(), example, taps)
        model.train(mode)
        widths = [z.shape[1] for z in taps.ordered()]
        gamma = self.gamma
        if gamma is None:
            gamma = model.invariance_weight if isinstance(model, Network) else 30.0
        built = nn.ModuleDict({"balance": Balance(gamma)})
        if self.predictor_adv or self.shared_predictor:
            built["predictor_adv"] = nn.ModuleList([Predictor(d) for d in widths])
        if self.predictor_clean and not self.shared_predictor:
            built["predictor_clean"] = nn.ModuleList([Predictor(d) for d in widths])
        return built.to(network_dtype(model))

    def inputs(
        self, images: Tensor, *, epsilon: float | Tensor, norm: str, generator: torch.Generator | None
    ) -> Tensor:
        if not self._noisy(norm):
            return images
        return draw_start(images, epsilon=epsilon, kind="uniform-unclamped", generator=generator)

    def before_epoch(self, companions: nn.ModuleDict, probe: Callable[[str, int], Tensor], epoch: int) -> None:
        if self.balance == "auto":
            accuracy = probe("clean", 1000)
            weights = part_of(companions, "balance", Balance)
            weights.adv.copy_(accuracy**self.balance_power)
            weights.clean.copy_((1 - accuracy) ** self.balance_power)

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked
    ) -> Views:
        logits, features = run(
            torch.cat([images, attacked.images]),
            "clean",
            "adv",
            layers=self.layers or tap_names(run.model),
            relu=self.relu,
            pool=self.pool,
        )
        clean, adv = logits.chunk(2)
        halves = [z.chunk(2) for z in features]
        return run.views(
            labels,
            logits_clean=clean,
            logits_adv=adv,
            features_clean=tuple(h[0] for h in halves),
            features_adv=tuple(h[1] for h in halves),
        )

    def heads(self, companions: nn.ModuleDict, views: Views) -> Views:
        def heads(name: str, wanted: bool) -> Iterable[nn.Module | None]:
            return part_of(companions, name, nn.ModuleList) if wanted else [None] * len(views.features_adv)

        h_adv = heads("predictor_adv", self.predictor_adv or self.shared_predictor)
        h_clean = h_adv if self.shared_predictor else heads("predictor_clean", self.predictor_clean)
        distances = [
            ar_at_invariance(wide(c), wide(a), distance=self.metric, align=self.align, predictor=p, predictor_clean=q)
            for a, c, p, q in zip(views.features_adv, views.features_clean, h_adv, h_clean, strict=True)
        ]
        weights = part_of(companions, "balance", Balance)
        extra = {"distances": torch.stack(distances), "a": weights.adv, "b": weights.clean, "gamma": weights.gamma}
        return views._replace(extra=extra)

    def loss(self, views: Views) -> dict[str, Tensor]:
        return {
            "ce_adv": views.extra["a"] * F.cross_entropy(wide(views.logits_adv), views.targets),
            "ce_clean": views.extra["b"] * F.cross_entropy(wide(views.logits_clean), views.targets),
            "invariance": views.extra["gamma"] * views.extra["distances"].mean(),
        }
