"""ARREST against a literal image-by-image transcription, its angle by hand, and where its standard network comes from."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from literal import BATCH, CLASSES, Double, Transcription, assert_same, base_net, saved, small_step, three_steps

import fastarat
from fastarat.defenses import ARREST
from fastarat.losses import angular_distance
from fastarat.runs import load_start


class Literal(Transcription):
    """L = CE(f(x^), y) + lam angle(z(x^), z_std(x)) / pi, the replay decided image by image."""

    def __init__(self, net, defense):
        super().__init__(net, defense)
        self.teacher, self.replayed = copy.deepcopy(net).eval(), []

    @staticmethod
    def angle(a, b):
        cosine = (a @ b / (a.norm() * b.norm())).clip(-1 + 1e-6, 1 - 1e-6)
        return torch.arccos(cosine)

    def __call__(self, x, y):
        adv = self.slow_attack(x, y, start="uniform", objective="ce")
        with torch.no_grad():
            z_std = self.teacher[:-1](x.double())
            self.net.eval()
            z_clean = self.net[:-1](x.double())
            self.net.train()
        used = adv.clone()
        if self.d.phi is not None:
            noisy = (x + self.noise(x)).clamp(0, 1)
            far = [math.degrees(self.angle(a, b)) > self.d.phi for a, b in zip(z_clean, z_std, strict=True)]
            if self.d.nr_batch:
                far = [sum(far) / len(far) > self.d.tau] * len(far)
            for i in range(len(x)):
                if far[i]:
                    used[i] = noisy[i]
            self.replayed.append(sum(far))
        z = self.net[:-1](used.double())
        angles = [self.angle(a, b) / math.pi for a, b in zip(z, z_std, strict=True)]
        loss = F.cross_entropy(self.net[-1](z), y) + self.d.lam * sum(angles) / len(angles)
        return self.learn(loss), adv


@pytest.mark.parametrize(
    ("options", "replayed"),
    [
        ({"phi": None}, []),
        ({"phi": 180.0}, [0, 0, 0]),
        ({"phi": 9.85}, [0, 3, 6]),
        ({"phi": 9.85, "nr_batch": True, "tau": 0.4}, [0, BATCH, BATCH]),
        ({"phi": 9.85, "nr_batch": True, "tau": 0.5}, [0, 0, BATCH]),
    ],
    ids=str,
)
def test_three_steps_equal_the_transcription(options, replayed, tmp_path):
    net = base_net()
    defense = ARREST(teacher=saved(tmp_path / "std", Double(net)), lam=5.0, **options)
    literal = Literal(net, defense)
    step = three_steps(defense, net, literal)
    assert literal.replayed == replayed
    assert_same(step.companions["teacher"].network.net, literal.teacher, "teacher")


def test_angle_by_hand():
    """(1, 0) against (1, 1), (0, 2), (-3, 0), (4, 0): 45, 90, 180 and 0 degrees, the last two clipped by 0.081."""
    a = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    b = torch.tensor([[1.0, 1.0], [0.0, 2.0], [-3.0, 0.0], [4.0, 0.0]])
    edge = math.degrees(math.acos(1 - 1e-6))
    expected = torch.tensor([45, 90, 180 - edge, edge])
    torch.testing.assert_close(angular_distance(a, b) * 180, expected, rtol=1e-2, atol=0)  # 1 - 1e-6 rounds
    torch.testing.assert_close(angular_distance(a.double(), b.double()) * 180, expected.double(), rtol=1e-7, atol=0)


def test_angle_gradients():
    torch.manual_seed(0)
    a, b = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(angular_distance, (a, b))
    # Equal, opposite and zero vectors, where arccos itself has an infinite gradient.
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    b = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [1.0, 0.0]])
    assert angular_distance(a, b).dtype == torch.float32
    assert torch.autograd.grad(angular_distance(a, b).sum(), a)[0].isfinite().all()
    assert angular_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_terms_by_hand():
    """Logits (ln 3, 0), label 0: CE = ln(4/3). Angles of 90 and 45 degrees, lam 8: 8 (1/2 + 1/4) / 2 = 3."""
    z, z_std = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    views = fastarat.Views(torch.tensor([0, 0]), logits_adv=torch.tensor([[math.log(3), 0.0]] * 2), features_adv=(z,),
                           features_clean=(z_std.requires_grad_(),), extra={"lam": torch.tensor(8.0)})  # fmt: skip
    terms = ARREST().loss(views)
    assert terms["ce_adv"].item() == pytest.approx(math.log(4 / 3))
    assert terms["angle"].item() == pytest.approx(3, rel=1e-5)
    assert not terms["angle"].requires_grad, "the standard network is a constant"
    compiled = torch.compile(ARREST().loss, fullgraph=True, backend="aot_eager")(views)
    torch.testing.assert_close(compiled, terms)


def step_for(tmp_path, **options):
    net = fastarat.build_model("resnet-small", num_classes=CLASSES)
    return small_step(ARREST(teacher=saved(tmp_path / "std", net), **options)), net


def test_student_starts_from_the_standard_network_which_never_moves(tmp_path):
    step, net = step_for(tmp_path)
    teacher = step.companions["teacher"]
    assert_same(step.model, net, "student")
    assert {id(p) for p in teacher.parameters()}.isdisjoint(id(p) for p in step.parameters)
    step.companions.train()
    for _ in range(2):
        step(torch.rand(8, 3, 8, 8), torch.randint(CLASSES, (8,)))
    assert not any(m.training for m in teacher.modules())
    assert_same(teacher.network, net, "teacher")
    assert not torch.equal(step.model.conv1.weight, net.conv1.weight)


def test_replay_noise_fills_the_ball_and_stays_in_it(tmp_path, monkeypatch):
    """A student turned by more than phi sees x plus uniform noise, whatever the attack found."""
    step, _ = step_for(tmp_path, phi=1.0)
    compared = []
    monkeypatch.setattr(
        "fastarat.defenses.arrest.angular_distance", lambda a, b: compared.append((a, b)) or angular_distance(a, b)
    )
    step.model.conv1.weight.data.neg_()
    seen = []
    step.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    images = torch.full((16, 3, 8, 8), 0.5)
    attacked = step.attack(images, torch.randint(CLASSES, (16,)))
    step.defense.forward(step.forward, step.companions, images, torch.zeros(16, dtype=torch.int64), attacked)
    assert len(compared) == 1
    assert not any(z.requires_grad for z in compared[0]), "the replay test keeps a graph"
    away = (seen[-1] - images).abs()
    assert not torch.equal(seen[-1], attacked.images)
    assert step.spec.epsilon * 0.98 < away.max() <= step.spec.epsilon + 1e-7
    assert away.mean().item() == pytest.approx(step.spec.epsilon / 2, rel=0.05)


def test_lam_defaults_to_the_networks(tmp_path):
    assert step_for(tmp_path / "a")[0].companions["teacher"].lam == 30
    assert step_for(tmp_path / "b", lam=1.5)[0].companions["teacher"].lam == 1.5
    wide = fastarat.nets.models.WideResNet(10, 1, CLASSES)
    defense = ARREST(teacher=saved(tmp_path / "wide", wide))
    load_start(defense, wide)
    assert defense.companions(wide, torch.rand(2, 3, 8, 8))["teacher"].lam == 100


def test_l2_needs_replay_off(tmp_path):
    with pytest.raises(fastarat.UserError, match="phi none"):
        ARREST(teacher="x").start_kind("l2")
    assert ARREST(teacher="x", phi=None).start_kind("l2") == "l2"
    assert (ARREST.attack_bn, ARREST.objective, ARREST().start_kind("linf")) == ("eval", "ce", "uniform")
