"""A defense of your own, with the captured attack, loaders, precision, resume and evaluation of the built-in ones.

From the command line:   fastarat train --defense examples/own_defense.py:Smooth --defense.beta 3
From Python:             python examples/own_defense.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

import fastarat
from fastarat.config import Config
from fastarat.specs import Attack


@dataclass(frozen=True, kw_only=True)
class Smooth(fastarat.Defense):
    """Clean cross-entropy plus the squared distance between clean and adversarial probabilities."""

    name: ClassVar[str] = "smooth"
    objective: ClassVar[str] = "kl"  # what the attack maximises
    start: ClassVar[str] = "gaussian"
    attack_bn: ClassVar[str] = "eval"
    needs_clean: ClassVar[bool] = True  # one forward on [clean; adv]

    beta: float = 20.0

    def loss(self, views: fastarat.Views) -> dict:
        clean, adv = views.logits_clean.float(), views.logits_adv.float()
        return {
            "ce": F.cross_entropy(clean, views.labels),
            "smooth": self.beta * (clean.softmax(1) - adv.softmax(1)).square().sum(1).mean(),
        }


if __name__ == "__main__":
    config = Config(epochs=2, limit_train=256, attack=Attack(epsilon=0.15, num_steps=5), out="runs/smooth")
    result = fastarat.train(config, defense=Smooth(beta=10.0))
    print({key: round(value, 3) for key, value in result.metrics[-1].items() if key.startswith("val/")})
