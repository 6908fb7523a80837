"""LBGAT against a literal transcription of the released loop, its loss by hand, and its natural network."""

import math

import pytest
import torch
import torch.nn.functional as F
from literal import Double, Transcription, assert_same, base_net, sgd, small_step, some_batch, some_views, three_steps
from torch import nn

import fastarat
from fastarat import losses
from fastarat.defenses import LBGAT


class TinyTeacher(LBGAT):
    """LBGAT whose natural network is a float64 one of the test's."""

    def companions(self, model, example):
        return nn.ModuleDict({"teacher": Double(base_net(seed=8))})


class Literal(Transcription):
    """As released: forwards f(x'), f(x), g(x); one SGD over both networks; g in train mode throughout."""

    def __init__(self, net, defense):
        super().__init__(net, defense)
        self.teacher = base_net(seed=8)
        self.sgd = sgd([*self.net.parameters(), *self.teacher.parameters()])

    def __call__(self, x, y):
        adv = self.slow_attack(x, y, start="gaussian", objective="kl")
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
        return self.learn(loss), adv


@pytest.mark.parametrize("options", [{}, {"beta": 6.0}, {"detach_teacher": True}], ids=str)
def test_three_steps_equal_the_transcription(options):
    defense = TinyTeacher(**options)
    net = base_net()
    literal = Literal(net, defense)
    step = three_steps(defense, net, literal)
    assert_same(step.companions["teacher"].net, literal.teacher, "teacher")


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


def test_where_the_gradients_go():
    v = some_views(torch.float64)
    adv, teacher, labels = v.logits_adv, v.extra["logits_teacher"], v.labels
    (moved,) = torch.autograd.grad(losses.lbgat(None, adv, teacher, labels)["mse"], teacher)
    torch.testing.assert_close(moved, 2 * (teacher - adv) / 20)
    stopped = losses.lbgat(None, adv, teacher, labels, detach_teacher=True)
    assert torch.autograd.grad(stopped["mse"], teacher, allow_unused=True) == (None,)
    assert torch.autograd.grad(stopped["ce_teacher"], teacher)[0].any()


def test_natural_network_by_image_size_and_name():
    small = small_step(LBGAT()).companions["teacher"]
    assert sum(p.numel() for p in small.parameters()) == sum(
        p.numel() for p in fastarat.build_model("resnet-small", num_classes=4).parameters()
    )
    net = fastarat.build_model("resnet-small", num_classes=10)
    released = fastarat.TrainStep(net, LBGAT(), torch.empty(2, 3, 32, 32)).companions["teacher"]
    assert sum(p.numel() for p in released.parameters()) == 11_173_962
    assert [getattr(released, f"layer{i}")[0].conv1.stride[0] for i in (1, 2, 3, 4)] == [1, 1, 2, 2]
    with pytest.raises(fastarat.UserError, match="resnet18"):
        small_step(LBGAT(teacher="resnet81"))


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
    step = small_step(LBGAT())
    teacher = step.companions["teacher"]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    step(*some_batch())
    assert teacher.training
    assert all(not torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    other = small_step(LBGAT())
    other.load_state_dict(step.state_dict())
    assert_same(other.companions["teacher"], teacher, "teacher")


def test_clean_forward_keeps_no_graph_unless_beta_needs_it():
    images, labels = some_batch()
    for beta in (0.0, 6.0):
        step = small_step(LBGAT(beta=beta))
        attacked = step.attack(images, labels)
        views = step.defense.forward(step.forward, step.companions, images, labels, attacked)
        assert views.logits_clean.requires_grad == (beta > 0)
        assert views.logits_adv.requires_grad
        assert views.extra["logits_teacher"].requires_grad
