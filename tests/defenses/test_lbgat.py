"""LBGAT against a literal transcription of the released loop, its loss by hand, and its natural network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from literal import Double, assert_same, base_net, sgd, slow_attack, three_steps
from torch import nn

import fastarat
from fastarat import losses
from fastarat.defenses import LBGAT
from fastarat.schedules import lr_at, recipe_of


class TinyTeacher(LBGAT):
    """LBGAT whose natural network is a float64 one of the test's."""

    def companions(self, model, example):
        return nn.ModuleDict({"teacher": Double(base_net(seed=8))})


class Literal:
    """As released: forwards f(x'), f(x), g(x); one SGD over both networks; g in train mode throughout."""

    def __init__(self, net, defense):
        self.net, self.teacher, self.d = copy.deepcopy(net), base_net(seed=8), defense
        self.sgd = sgd([*self.net.parameters(), *self.teacher.parameters()])
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, x, y):
        adv = slow_attack(self.net, x, y, self.generator, start="gaussian", objective="kl")
        self.teacher.train()
        out_adv = self.net(adv.double())
        out_natural = self.net(x.double())
        out_orig = self.teacher(x.double())
        loss_mse = nn.MSELoss()(out_adv, out_orig.detach() if self.d.detach_teacher else out_orig)
        loss_nat = nn.CrossEntropyLoss()(out_orig, y)
        loss_kl = (1.0 / len(x)) * nn.KLDivLoss(reduction="sum")(
            F.log_softmax(out_adv, dim=1), F.softmax(out_natural, dim=1)
        )
        loss = loss_mse + loss_nat + self.d.beta * loss_kl
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item(), adv


@pytest.mark.parametrize("options", [{}, {"beta": 6.0}, {"detach_teacher": True}], ids=str)
def test_three_steps_equal_the_transcription(options):
    defense = TinyTeacher(**options)
    net = base_net()
    literal = Literal(net, defense)
    step = three_steps(defense, net, literal)
    assert_same(step.companions["teacher"].net, literal.teacher, "teacher")
    assert step.model.net[1].num_batches_tracked == 6
    assert step.companions["teacher"].net[1].num_batches_tracked == 3


def test_loss_by_hand():
    """f(x') = (1, 0), g(x) = (0, 2), label 1: MSE = (1 + 4)/4 over B and C; CE = ln(1 + e^-2)."""
    adv, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    terms = losses.lbgat(None, adv, teacher, torch.tensor([1, 1]))
    assert set(terms) == {"mse", "ce_teacher"}
    assert terms["mse"].item() == pytest.approx(5 / 2)
    assert terms["ce_teacher"].item() == pytest.approx(math.log(1 + math.exp(-2)))
    # p = (1/2, 1/2), p' = (3/4, 1/4): KL(p || p') = ln(4/3)/2, as in TRADES.
    six = losses.lbgat(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), teacher[:1], torch.tensor([1]), 6.0)
    assert six["kl"].item() == pytest.approx(3 * math.log(4 / 3))


def test_gradients_by_finite_differences_and_where_they_go():
    torch.manual_seed(0)
    adv, clean, teacher = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    labels = torch.tensor([0, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(
        lambda c, a, t: sum(losses.lbgat(c, a, t, labels, 6.0).values()), (clean, adv, teacher)
    )
    (moved,) = torch.autograd.grad(losses.lbgat(None, adv, teacher, labels)["mse"], teacher)
    torch.testing.assert_close(moved, 2 * (teacher - adv) / 20)
    stopped = losses.lbgat(None, adv, teacher, labels, detach_teacher=True)
    assert torch.autograd.grad(stopped["mse"], teacher, allow_unused=True) == (None,)
    assert torch.autograd.grad(stopped["ce_teacher"], teacher)[0].any()


def test_float32_inside():
    bf16 = [torch.randn(3, 4).bfloat16() for _ in range(3)]
    terms = losses.lbgat(*bf16, torch.tensor([0, 1, 2]), 6.0)
    assert all(t.dtype == torch.float32 for t in terms.values())
    torch.testing.assert_close(terms, losses.lbgat(*(t.float() for t in bf16), torch.tensor([0, 1, 2]), 6.0))


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_loss_compiles_whole(beta):
    torch.manual_seed(0)
    views = fastarat.Views(torch.tensor([0, 1, 2]), logits_clean=torch.randn(3, 4), logits_adv=torch.randn(3, 4),
                           extra={"logits_teacher": torch.randn(3, 4)})  # fmt: skip
    terms = torch.compile(LBGAT(beta=beta).loss, fullgraph=True, backend="aot_eager")(views)
    torch.testing.assert_close(terms, LBGAT(beta=beta).loss(views))


def step_for(defense, size=8, classes=4):
    net = fastarat.build_model("resnet-small", num_classes=classes)
    return fastarat.TrainStep(net, defense, torch.empty(2, 3, size, size), num_steps=2)


def test_natural_network_by_image_size_and_name():
    small = step_for(LBGAT()).companions["teacher"]
    assert sum(p.numel() for p in small.parameters()) == sum(
        p.numel() for p in fastarat.build_model("resnet-small", num_classes=4).parameters()
    )
    released = step_for(LBGAT(), size=32, classes=10).companions["teacher"]
    assert sum(p.numel() for p in released.parameters()) == 11_173_962
    assert [getattr(released, f"layer{i}")[0].conv1.stride[0] for i in (1, 2, 3, 4)] == [1, 1, 2, 2]
    with pytest.raises(fastarat.UserError, match="resnet18"):
        step_for(LBGAT(teacher="resnet81"))


def test_natural_network_sees_what_the_student_sees():
    net = fastarat.build_model("resnet-small", num_classes=7, in_channels=1, mean=[0.2], std=[0.5])
    step = fastarat.TrainStep(net, LBGAT(), torch.empty(2, 1, 8, 8), kernels="plain")
    teacher = step.companions["teacher"]
    assert teacher.bn1.backend == "plain"
    assert (teacher.normalize.mean.item(), teacher.normalize.std.item()) == (step.model.normalize.mean.item(), 0.5)
    assert teacher(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert step.model.training
    assert step.model.bn1.num_batches_tracked == 0, "building the teacher moved the student's statistics"


def test_natural_network_learns_and_is_saved():
    step = step_for(LBGAT())
    teacher = step.companions["teacher"]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    step(torch.rand(8, 3, 8, 8), torch.randint(4, (8,)))
    assert teacher.training
    assert all(not torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    other = step_for(LBGAT())
    other.load_state_dict(step.state_dict())
    assert_same(other.companions["teacher"], teacher, "teacher")


def test_clean_forward_keeps_no_graph_unless_beta_needs_it():
    images, labels = torch.rand(4, 3, 8, 8), torch.randint(4, (4,))
    for beta in (0.0, 6.0):
        step = step_for(LBGAT(beta=beta))
        attacked = step.attack(images, labels)
        views = step.defense.forward(step.forward, step.companions, images, labels, attacked)
        assert views.logits_clean.requires_grad == (beta > 0)
        assert views.logits_adv.requires_grad
        assert views.extra["logits_teacher"].requires_grad


def test_released_settings():
    assert (LBGAT().beta, LBGAT.recipe, LBGAT.released_budget) == (0.0, "lbgat", (0.031, 0.007))
    assert (LBGAT.objective, LBGAT.start, LBGAT.attack_bn) == ("kl", "gaussian", "eval")
    assert "resnet18-lbgat" in LBGAT().describe("linf")["natural network"]
    recipe = recipe_of(LBGAT.recipe)
    rates = [lr_at(e, 0, steps=391, epochs=100, recipe=recipe) for e in (1, 2, 75, 76, 90, 91, 100)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (recipe.epochs, recipe.weight_decay) == (100, 2e-4)
