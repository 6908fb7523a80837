"""Your own training loop and network: take the step, or only the attack, from fastarat."""

import torch
from torch import nn

import fastarat
from fastarat.data import Augment, load_dataset, make_loader

device = "cuda" if torch.cuda.is_available() else "cpu"
data = load_dataset("digits")
loader = make_loader(data.train, batch_size=64, device=device, shuffle=True, augment=Augment(padding=1))

# Any network with BatchNorm: TrainStep splits it in place and keeps everything else.
network = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
).to(device)  # fmt: skip

step = fastarat.TrainStep(
    network,
    fastarat.ARAT(gamma=5.0),
    example=torch.empty(2, 1, 8, 8),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    epsilon=0.1,
    num_steps=5,
)
for epoch in range(2):
    for images, labels, _ in loader.epoch(epoch):
        step(images, labels)
    print(epoch, {name: round(value, 3) for name, value in step.meter.read().items()})
    step.meter.reset()

# Only the attack: one function of tensors, captured as one CUDA graph where there is a GPU.
attack = fastarat.attacks.PGD(network.eval(), epsilon=0.1, step_size=0.025, num_steps=10)
images, labels, _ = next(iter(loader.epoch(0)))
if device == "cuda":
    attack = fastarat.capture(attack, (images, labels))
adversarial = attack(images, labels).images
print("largest change of a pixel:", round((adversarial - images).abs().max().item(), 4))
