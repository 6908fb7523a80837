"""PGD against models whose worst case is known in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fastarat.ascent import OBJECTIVES, kl, margin
from fastarat.attacks import PGD, pgd, random_start, strongest


def linear_model() -> tuple[nn.Module, torch.Tensor]:
    """Two classes; the margin falls by exactly epsilon * L1 norm of w1 - w0."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 12, generator=g))
        model[1].bias.zero_()
    return model, (model[1].weight[1] - model[1].weight[0]).detach()


@pytest.mark.parametrize(
    ("norm", "dual", "objective", "epsilon", "step_size", "num_steps", "tolerance"),
    [
        ("linf", 1, "ce", 0.1, 0.03, 8, 1e-5),
        ("linf", 1, "cw", 0.1, 0.03, 8, 1e-5),
        ("l2", 2, "ce", 0.2, 0.1, 10, 1e-4),
    ],
)
def test_the_closed_form_is_reached(norm, dual, objective, epsilon, step_size, num_steps, tolerance):
    model, w = linear_model()
    images = 0.3 + 0.4 * torch.rand(32, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    options = {"epsilon": epsilon, "step_size": step_size, "num_steps": num_steps}
    found = pgd(model, images, labels, labels, images, norm=norm, objective=objective, **options).images
    sign = torch.where(labels == 1, 1.0, -1.0)
    expected = sign * (images.flatten(1) @ w) - epsilon * w.norm(p=dual)
    torch.testing.assert_close(sign * (found.flatten(1) @ w), expected, atol=tolerance, rtol=tolerance)


def test_objectives_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(OBJECTIVES["ce"](logits, labels), torch.tensor([math.log(4 / 3), math.log(2)]))
    torch.testing.assert_close(margin(logits, labels), torch.tensor([-math.log(3.0), 0.0]))
    # KL((1/2, 1/2) || (3/4, 1/4)) = ln(4/3) / 2
    torch.testing.assert_close(kl(logits[:1], torch.zeros(1, 2)), torch.tensor([math.log(4 / 3) / 2]))
    assert kl(logits, logits).abs().max() < 1e-6


def test_inputs_parameters_and_global_generator_are_untouched():
    model, _ = linear_model()
    images, labels = torch.rand(4, 3, 2, 2), torch.randint(2, (4,))
    start = random_start(images, epsilon=0.1, generator=torch.Generator().manual_seed(3))
    kept = images.clone(), start.clone(), torch.get_rng_state()
    pgd(model, images, labels, labels, start, epsilon=0.1, step_size=0.05, num_steps=3)
    assert torch.equal(images, kept[0])
    assert torch.equal(start, kept[1])
    assert torch.equal(torch.get_rng_state(), kept[2])
    assert all(p.grad is None for p in model.parameters())
    assert not start.requires_grad


def test_kappa_counts_points_before_each_step():
    """One feature, boundary at 0.5: starting at 0.55 and stepping down 0.02, points 0.55, 0.53, 0.51 are correct."""

    def forward(x):
        value = x.flatten(1).mean(1)
        return torch.stack([0.5 - value, value - 0.5], 1)

    images = torch.full((2, 1, 1, 1), 0.55)
    images[1] = 0.95
    labels = torch.ones(2, dtype=torch.int64)
    attacked = pgd(forward, images, labels, labels, images, epsilon=0.2, step_size=0.02, num_steps=6, count=True)
    assert attacked.kappa.tolist() == [3, 6]


@settings(max_examples=25, deadline=None)
@given(
    epsilon=st.floats(0.001, 1.0),
    step=st.floats(0.001, 1.0),
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_every_result_lies_in_the_ball_and_in_range(epsilon, step, seed, norm):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, 2, 2, generator=g)
    model, _ = linear_model()
    labels = torch.randint(2, (3,), generator=g)
    start = random_start(images, epsilon=epsilon, kind="uniform", norm=norm, generator=g)
    out = pgd(model, images, labels, labels, start, epsilon=epsilon, step_size=step, num_steps=2, norm=norm).images
    distance = (out - images).flatten(1).norm(dim=1, p=2 if norm == "l2" else math.inf)
    assert distance.max() <= epsilon + 1e-6
    assert out.min() >= 0
    assert out.max() <= 1


def test_starts():
    images = torch.full((400, 3, 2, 2), 0.01)
    g = torch.Generator().manual_seed(0)
    uniform = random_start(images, epsilon=0.1, kind="uniform", generator=g)
    loose = random_start(images, epsilon=0.1, kind="uniform-unclamped", generator=g)
    gauss = random_start(images, epsilon=0.1, kind="gaussian", generator=g)
    assert uniform.min() == 0
    assert -0.09 <= loose.min() < -0.085
    assert (loose - images).abs().max() <= 0.1 + 1e-6
    assert 0.8e-3 < (gauss - images).std() < 1.2e-3
    assert torch.equal(random_start(images, epsilon=0.1, kind="none"), images)
    l2 = random_start(torch.full((400, 3, 2, 2), 0.5), epsilon=0.3, norm="l2", generator=g)
    lengths = (l2 - 0.5).flatten(1).norm(dim=1)
    assert lengths.max() <= 0.3 + 1e-6
    assert 0.13 < lengths.mean() < 0.17
    again = [random_start(images, epsilon=0.1, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)


def test_restarts_keep_the_strongest_point_of_each_image():
    model, _ = linear_model()
    images = torch.rand(8, 3, 2, 2)
    labels = torch.randint(2, (8,))
    weak = pgd(model, images, labels, labels, images, epsilon=0.1, step_size=0.01, num_steps=1)
    strong = pgd(model, images, labels, labels, images, epsilon=0.1, step_size=0.1, num_steps=1)
    mixed = torch.cat([strong.images[:4], weak.images[4:]]), torch.cat([weak.images[:4], strong.images[4:]])
    best = strongest(model, [lambda: weak._replace(images=mixed[0]), lambda: weak._replace(images=mixed[1])], labels)
    assert torch.equal(best.images, strong.images)


@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_an_attack_in_bf16_is_autocasts_and_leaves_the_weights_alone(objective):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    images, labels = torch.rand(6, 3, 8, 8), torch.randint(4, (6,))
    with torch.no_grad():
        model(images)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 3, "objective": objective}
    attack = PGD(model, precision="bf16", count=True, **options)
    seen = []
    hook = model[0].register_forward_hook(lambda m, args, out: seen.append((m.weight.dtype, out.dtype)))
    found = attack(images, labels)
    hook.remove()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    model.eval()

    def forward(points):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return model(points)

    start = random_start(images, epsilon=0.1, generator=torch.Generator().manual_seed(0))
    target = forward(images).detach() if objective == "kl" else labels
    wanted = pgd(forward, images, labels, target, start, count=True, **options)
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(found.kappa, wanted.kappa)
    assert found.images.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
