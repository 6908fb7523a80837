"""Split BatchNorm: one concatenated forward equals separate forwards in values, gradients and statistics."""

import copy

import pytest
import torch
from torch import nn

import fastarat
from fastarat.nets.batchnorm import (
    BatchNorm2d,
    SplitBatchNorm2d,
    branch,
    branches_of,
    grouped_batchnorm,
    single_branch,
    split_batchnorm,
)
from fastarat.nets.models import build_model


def plain_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4 * 16, 8), nn.BatchNorm1d(8), nn.Linear(8, 5),
    )  # fmt: skip


def clean_and_adv(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    clean = torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=g)
    return clean, 1.7 * torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=g) + 0.5


def distinct(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic its own value, so that mixing two branches up shows."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(0.3 * torch.rand(tensor.shape, dtype=tensor.dtype, generator=g))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convert", [split_batchnorm, grouped_batchnorm])
def test_one_forward_equals_two(convert, training):
    torch.manual_seed(0)
    joint = distinct(convert(plain_net().double())).train(training)
    apart = copy.deepcopy(joint)
    clean, adv = clean_and_adv()
    with branch(joint, "clean", "adv"):
        y = joint(torch.cat([clean, adv]))
    with branch(apart, "clean"):
        y_clean = apart(clean)
    with branch(apart, "adv"):
        y_adv = apart(adv)
    torch.testing.assert_close(y, torch.cat([y_clean, y_adv]), rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    ((y_clean * weights[:6]).sum() + (y_adv * weights[6:]).sum()).backward()
    for (name, p), q in zip(joint.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(dict(joint.named_buffers()), dict(apart.named_buffers()), rtol=1e-12, atol=1e-12)


def test_matches_torch_batchnorm_over_training_steps():
    torch.manual_seed(0)
    reference = plain_net().double()
    ours = grouped_batchnorm(copy.deepcopy(reference))
    assert sum(isinstance(m, BatchNorm2d) for m in ours.modules()) == 3
    for seed in range(3):
        x = clean_and_adv(seed)[0]
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=1e-10, atol=1e-12)
    assert list(ours.state_dict()) == list(reference.state_dict())


def test_branches_do_not_touch_each_other():
    model = split_batchnorm(plain_net())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with branch(model, "clean"):
        model(torch.rand(4, 3, 8, 8)).sum().backward()
    after = model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {
        f"{i}.clean.{n}" for i in (1, 4, 7) for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert model[1].weight.grad is None
    assert model[1].clean.weight.grad is not None


def test_update_order_and_frozen_statistics():
    clean, adv = clean_and_adv()
    joint = torch.cat([clean, adv])

    def statistics(updates):
        layer = BatchNorm2d(3).double()
        with branch(layer, "clean", "adv", updates=updates):
            layer(joint)
        return layer.running_mean

    by_hand = torch.zeros(3, dtype=torch.float64)
    for part in (adv, clean, clean):
        by_hand = 0.9 * by_hand + 0.1 * part.mean((0, 2, 3))
    torch.testing.assert_close(statistics(("adv", "clean", "clean")), by_hand)
    assert not torch.allclose(statistics(None), by_hand)
    assert torch.equal(statistics(()), torch.zeros(3, dtype=torch.float64))


def test_default_branch_is_adv_and_exports_as_an_ordinary_network():
    torch.manual_seed(0)
    model = distinct(split_batchnorm(build_model("resnet-small", num_classes=4))).eval()
    assert branches_of(model) == ("clean", "adv")
    x = torch.rand(3, 3, 12, 12)
    with branch(model, "adv"):
        adv = model(x)
    with branch(model, "clean"):
        clean = model(x)
    assert torch.equal(model(x), adv)
    assert not torch.allclose(clean, adv)
    ordinary = build_model("resnet-small", num_classes=4).eval()
    ordinary.load_state_dict({k: v for k, v in model.state_dict().items() if ".clean." not in k})
    torch.testing.assert_close(ordinary(x), adv)
    torch.testing.assert_close(single_branch(model, "clean")(x), clean)
    assert branches_of(single_branch(model)) == ()


class ActNorm(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d: normalises, then drops and activates."""

    def __init__(self, n):
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_subclass_with_activation_keeps_it():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 4, 1), ActNorm(4))
    split = split_batchnorm(copy.deepcopy(reference))
    x = torch.rand(4, 3, 5, 5)
    torch.testing.assert_close(split(x), reference(x))
    assert isinstance(split[1], SplitBatchNorm2d)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), "no BatchNorm layer to split"),
        (nn.Sequential(OwnNorm(4)), "forward does more"),
        (nn.Sequential(nn.SyncBatchNorm(4)), "SyncBatchNorm"),
    ],
)
def test_networks_that_cannot_be_split(model, words):
    with pytest.raises(fastarat.UserError, match=words):
        split_batchnorm(model)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_options(affine):
    layer = SplitBatchNorm2d(3, affine=affine, track_running_stats=False).eval()
    reference = nn.BatchNorm2d(3, affine=affine, track_running_stats=False)
    x = torch.rand(4, 3, 5, 5)
    torch.testing.assert_close(layer(x), reference(x))
    cumulative, torch_one = BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for scale in (1, 5, 2):
        cumulative(scale * x), torch_one(scale * x)
    torch.testing.assert_close(cumulative.running_mean, torch_one.running_mean)
    torch.testing.assert_close(cumulative.running_var, torch_one.running_var)


def test_a_part_of_a_network_takes_its_own_branch():
    parts = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in "ab"]
    network = fastarat.split_batchnorm(nn.Sequential(*parts))
    step = fastarat.TrainStep(
        nn.Sequential(network, nn.Flatten(), nn.Linear(48, 2)), fastarat.ARAT(), torch.rand(2, 3, 4, 4)
    )
    first, second = network[0][1], network[1][1]
    with branch(step.model, "clean"), branch(network[0], "adv"):
        network(torch.rand(2, 3, 4, 4))
    counts = [int(m.num_batches_tracked) for m in (first, first.clean, second, second.clean)]
    assert counts == [1, 0, 0, 1]
