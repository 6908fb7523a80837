"""Weights in and out, against networks written here a second time with the released files' names."""

import argparse
import hashlib
import json
import os
import re
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from archives import place_cifar
from safetensors.torch import load_file, save_file
from torch import nn

import fastarat
from fastarat.cli import main
from fastarat.config import Config, write_yaml
from fastarat.errors import UserError
from fastarat.interchange import export, exporting, import_checkpoint
from fastarat.nets.models import build_model
from fastarat.runs import Run, load_network

# The networks as the papers and released files describe them, with PyTorch's own layers; `sets` names the BatchNorm
# sets of a split network (AR-AT), () is an ordinary one.


class Sets(nn.ModuleDict):
    """BatchNorm sets under their names; `current` is the one in use."""

    def __init__(self, channels, names):
        super().__init__({name: nn.BatchNorm2d(channels) for name in names})
        self.current = names[0]

    def forward(self, x):
        return self[self.current](x)


def batchnorm(channels, sets):
    return Sets(channels, sets) if sets else nn.BatchNorm2d(channels)


def conv(planes_in, planes, size, stride):
    return nn.Conv2d(planes_in, planes, size, stride, size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, planes_in, planes, stride, sets):
        super().__init__()
        self.conv1, self.bn1 = conv(planes_in, planes, 3, stride), batchnorm(planes, sets)
        self.conv2, self.bn2 = conv(planes, planes, 3, 1), batchnorm(planes, sets)
        self.shortcut = self.shortcut_bn = nn.Identity()
        if planes_in != planes and sets:
            self.shortcut, self.shortcut_bn = conv(planes_in, planes, 1, stride), batchnorm(planes, sets)
        elif planes_in != planes:
            self.shortcut = nn.Sequential(conv(planes_in, planes, 1, stride), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut_bn(self.shortcut(x)))


class PreActBlock(nn.Module):
    wide = False  # whose shortcut has another name

    def __init__(self, planes_in, planes, stride, sets):
        super().__init__()
        self.bn1, self.conv1 = batchnorm(planes_in, sets), conv(planes_in, planes, 3, stride)
        self.bn2, self.conv2 = batchnorm(planes, sets), conv(planes, planes, 3, 1)
        self.shortcut = self.convShortcut = nn.Identity()
        if planes_in != planes and self.wide:
            self.convShortcut = conv(planes_in, planes, 1, stride)
        elif planes_in != planes:
            self.shortcut = nn.Sequential(conv(planes_in, planes, 1, stride))
        self.same = planes_in == planes

    def forward(self, x):
        first = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(first))))
        return out + (x if self.same else self.convShortcut(self.shortcut(first)))


class WideBlock(PreActBlock):
    wide = True


class ResNet18(nn.Module):
    def __init__(self, classes=7, sets=(), block=Block, final_bn=True):
        super().__init__()
        self.conv1, planes = conv(3, 64, 3, 1), 64
        if block is Block:
            self.bn1 = batchnorm(64, sets)
        for i, width in enumerate((64, 128, 256, 512), 1):
            stride = 1 if i == 1 else 2
            setattr(self, f"layer{i}", nn.Sequential(block(planes, width, stride, sets), block(width, width, 1, sets)))
            planes = width
        if block is PreActBlock and final_bn:
            self.bn = batchnorm(512, sets)
        self.linear = nn.Linear(512, classes)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if hasattr(self, "bn1") else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.relu(self.bn(x)) if hasattr(self, "bn") else x
        return self.linear(x.mean((2, 3)))


class Wide(nn.Module):
    def __init__(self, depth=10, widen=1, classes=7, sets=(), unused=False):
        super().__init__()
        self.conv1, planes, count = conv(3, 16, 3, 1), 16, (depth - 4) // 6
        for i in (1, 2, 3):
            width, stride = 16 * widen * 2 ** (i - 1), 1 if i == 1 else 2
            blocks = [WideBlock(planes if b == 0 else width, width, 1 if b else stride, sets) for b in range(count)]
            setattr(self, f"block{i}", nn.ModuleDict({"layer": nn.Sequential(*blocks)}))
            planes = width
        if unused:
            self.sub_block1 = nn.ModuleDict({"layer": nn.Sequential(WideBlock(16, 16 * widen, 1, sets))})
        self.bn1, self.fc = batchnorm(planes, sets), nn.Linear(planes, classes)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def lived(net: nn.Module) -> nn.Module:
    """As after training: every BatchNorm set has statistics and affine of its own."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
            m.num_batches_tracked.fill_(3)
    return net.eval()


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(net: nn.Module, branch: str | None = None, images=IMAGES) -> torch.Tensor:
    for m in net.modules():
        if isinstance(m, Sets):
            m.current = branch
    if branch is None:
        return net(images)
    with fastarat.branch(net, branch):
        return net(images)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def saved(content, path) -> str:
    torch.save(content, path)
    return str(path)


def imported(state, folder, **options):
    """Import a state dict; return the network, its metadata and the card."""
    run = import_checkpoint(saved(state, folder / "file.pt"), folder / "imported", **options)
    network, meta, _ = load_network(run)
    return network, meta, (run / "card.txt").read_text()


@pytest.mark.parametrize("sets", [("clean", "adv"), ("base", "base_adv")])
@pytest.mark.parametrize(
    ("make", "name"),
    [(ResNet18, "resnet18"), (Wide, "wrn-10-1"), (lambda **k: Wide(16, 2, **k), "wrn-16-2"),
     (lambda **k: ResNet18(block=PreActBlock, **k), "preactresnet18")],
)  # fmt: skip
def test_split_checkpoints_give_the_same_logits_in_both_branches(tmp_path, make, name, sets):
    theirs = lived(make(sets=sets))
    ours, meta, _ = imported(theirs.state_dict(), tmp_path)
    assert (meta["model"], meta["num_classes"], meta["branches"]) == (name, 7, ["clean", "adv"])
    assert Run(tmp_path / "imported").read_config() is None
    for own, other in (("clean", sets[0]), ("adv", sets[1])):
        assert same(logits(ours, own), logits(theirs, other)), own
    assert not same(logits(ours, "clean"), logits(ours, "adv"))
    assert {int(v) for k, v in ours.state_dict().items() if k.endswith("tracked")} == {3}


def test_the_literal_resnet18_has_the_official_file_s_entries():
    keys = ResNet18(10, ("clean", "adv")).state_dict()
    assert len(keys) == 222
    assert {
        "layer2.0.shortcut.weight",
        "layer2.0.shortcut_bn.adv.running_var",
        "bn1.clean.num_batches_tracked",
    } <= keys.keys()


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 76, "acc": np.float64(0.5)},
                                  lambda s: {"net": s, "optimizer": {"state": {}}, "a1": 1, "a2": 2, "a3": 3, "a4": 4, "a5": 5}])  # fmt: skip
def test_prefixes_wrappers_and_unused_copies(tmp_path, prefix, wrap):
    theirs = lived(Wide(unused=True))
    state = {prefix + k: v for k, v in theirs.state_dict().items()}
    ours, meta, card = imported(wrap(state), tmp_path)
    assert (meta["model"], meta["branches"]) == ("wrn-10-1", [])
    assert same(logits(ours), logits(theirs))
    count = sum(p.numel() for p in theirs.sub_block1.parameters())
    assert f"dropped: sub_block1.* ({len(theirs.sub_block1.state_dict())} entries, {count:,} parameters)" in card
    assert ("taken off" in card) == bool(prefix)
    for word in wrap({}):
        assert word in card, "a wrapper's other entries are reported"


@pytest.mark.parametrize(
    ("rename", "net"),
    [
        (lambda k: k.replace("linear.", "fc."), ResNet18),
        (lambda k: k.replace("shortcut.", "downsample."), ResNet18),
        (lambda k: k.replace("shortcut.0.", "shortcut.conv.").replace("shortcut.1.", "shortcut.bn."), ResNet18),
        (lambda k: k.replace("shortcut.0.", "shortcut_conv.").replace("shortcut.1.", "shortcut_bn."), ResNet18),
        (lambda k: re.sub(r"^bn\.", "bn1.", k).replace("linear.", "fc."), lambda: ResNet18(block=PreActBlock)),
        (lambda k: k.replace("convShortcut.", "shortcut.0.").replace("fc.", "linear."), Wide),
    ],
)
def test_other_names_of_shortcuts_and_classifier(tmp_path, rename, net):
    theirs = lived(net() if net is not Wide else Wide(10, 2))
    state = {rename(k): v for k, v in theirs.state_dict().items()}
    assert state.keys() != theirs.state_dict().keys()
    assert same(logits(imported(state, tmp_path)[0]), logits(theirs))


@pytest.mark.parametrize("where", ["given", "normalize.", "", "0."])
def test_normalisation_is_kept_inside(tmp_path, where):
    theirs = lived(Wide())
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    state, given = theirs.state_dict(), {}
    if where == "given":
        given = {"mean": mean, "std": std}
    else:
        names = ("mu", "sigma") if where == "" else (f"{where}mean", f"{where}std")
        inner = {"normalize.": "model.", "0.": "1.", "": ""}[where]
        state = {inner + k: v for k, v in state.items()}
        state |= {n: torch.tensor(v).view(1, 3, 1, 1) for n, v in zip(names, (mean, std), strict=True)}
    ours, meta, _ = imported(state, tmp_path, **given)
    normalised = (IMAGES - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert meta["normalized"]
    assert same(logits(ours), logits(theirs, images=normalised))


def test_counters_may_be_missing_half_precision_and_safetensors_are_read(tmp_path):
    theirs = lived(Wide()).half()
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("tracked")}
    save_file(state, tmp_path / "a.safetensors")
    run = import_checkpoint(tmp_path / "a.safetensors", tmp_path / "run")
    ours = load_network(run)[0]
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert same(logits(ours), logits(theirs.float()))
    card = (run / "card.txt").read_text()
    assert "counters are not in the file" in card
    assert "torch.float16" in card


def test_one_named_set_is_an_ordinary_network_and_lbgat_s_twin_must_be_named(tmp_path):
    theirs = lived(Wide(sets=("base",)))
    ours, meta, _ = imported(theirs.state_dict(), tmp_path)
    assert meta["branches"] == []
    assert same(logits(ours), logits(theirs, "base"))
    (tmp_path / "two").mkdir()
    assert imported(ResNet18().state_dict(), tmp_path / "two", model="resnet18-lbgat")[1]["model"] == "resnet18-lbgat"


class Patches(nn.Module):
    """Like timm's vision transformers: a parameter of its own beside its modules, and BatchNorm to split."""

    def __init__(self, classes, channels):
        super().__init__()
        self.cls_token = nn.Parameter(torch.rand(8, 1, 1))
        self.stem, self.norm, self.head = conv(channels, 8, 3, 1), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.stem(x)) + self.cls_token).mean((2, 3)))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_timm_networks(tmp_path, monkeypatch, normalised, split):
    make = lambda name, pretrained, num_classes, in_chans: Patches(num_classes, in_chans)  # noqa: E731
    any_size = lambda name: SimpleNamespace(fixed_input_size=False)  # noqa: E731
    timm = SimpleNamespace(list_models=lambda: ["patches"], create_model=make, get_pretrained_cfg=any_size)
    monkeypatch.setitem(sys.modules, "timm", timm)
    theirs = Patches(7, 3)
    theirs = lived(fastarat.split_batchnorm(theirs) if split else theirs)
    given = {"mean": [0.5] * 3, "std": [0.25] * 3} if normalised else {}
    ours, meta, _ = imported(theirs.state_dict(), tmp_path, model="timm:patches", num_classes=7, **given)
    assert (meta["model"], meta["normalized"], bool(meta["branches"])) == ("timm:patches", normalised, split)
    images = (IMAGES - 0.5) / 0.25 if normalised else IMAGES
    for branch in ("clean", "adv") if split else (None,):
        assert same(logits(ours, branch), logits(theirs, branch, images))


def test_several_state_dicts_need_a_name(tmp_path):
    last, best = lived(Wide()), lived(Wide())
    file = saved({"last": last.state_dict(), "best": best.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"several state dicts: name one with --prefer \(last, best\)"):
        import_checkpoint(file, tmp_path / "run")
    with pytest.raises(UserError, match="no state dict 'bets'; did you mean 'best'"):
        import_checkpoint(file, tmp_path / "run", prefer="bets")
    assert not (tmp_path / "run").exists()
    run = import_checkpoint(file, tmp_path / "run", prefer="best")
    assert same(logits(load_network(run)[0]), logits(best))
    assert not same(logits(load_network(run)[0]), logits(last))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "read", [lambda file: import_checkpoint(file, file.parent / "run"), load_network], ids=["import", "load"]
)
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda done: {"format": 1, "step": {}, "state_dict": {}, "args": Harmful(str(done))}, r"(posix|nt)\.mkdir"),
        (lambda done: Wide(), r"[\w.]*test_interchange\.Wide"),
        (lambda done: {"state_dict": {}, "args": argparse.Namespace(lr=0.1)}, r"argparse\.Namespace"),
    ],
)
def test_files_with_pickled_code_are_refused_and_do_not_run(tmp_path, read, content, named):
    done, file = tmp_path / "done", tmp_path / "a.pt"
    torch.save(content(done), file)
    mend = r"save the state dict alone \(torch.save\(model.state_dict\(\), FILE\)\)"
    with pytest.raises(
        UserError, match=f"{named}, .* run code of the file, which fastarat never does; .*{mend}"
    ) as caught:
        read(file)
    assert "weights_only" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    torch.load(file, weights_only=False)
    assert done.exists() == ("mkdir" in named), "the file would have run its code"


def test_numpy_numbers_of_older_numpy_are_read_and_torchscript_is_not(tmp_path):
    file = saved({"state_dict": Wide().state_dict(), "acc": np.float64(0.5), "n": np.int64(3)}, tmp_path / "new.pt")
    with zipfile.ZipFile(file) as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            assert (b"numpy._core" in content) == name.endswith("data.pkl")
            old.writestr(name, content.replace(b"numpy._core", b"numpy.core"))
    for name in ("new", "old"):
        run = import_checkpoint(tmp_path / f"{name}.pt", tmp_path / name)
        assert "left: acc, n" in (run / "card.txt").read_text()
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match="TorchScript program"):
        import_checkpoint(tmp_path / "script.pt", tmp_path / "run")


class Forged:
    """Pickles as NumPy's number does, of a dtype whose state names a byte order that there is none of."""

    def __init__(self, code, order, content):
        self.code, self.order, self.content = code, order, content

    def __reduce__(self):
        return np._core.multiarray.scalar, (ForgedDtype(self.code, self.order), self.content)


class ForgedDtype(Forged):
    def __init__(self, code, order):
        self.code, self.order = code, order

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, self.order, None, None, None, -1, -1, 0)


@pytest.mark.parametrize(
    ("code", "order", "content"),
    [
        ("f8", "\x06\x00\x00", bytes(8)),  # NumPy's own unpickling ends the process here
        ("f8", "<", bytes(7)), ("O", "|", bytes(8)), ("O8", "|", bytes(8)), ("V8", "|", bytes(8)), ("f8", 7, bytes(8)),
        ("f8", "<", "text"), (7, "<", bytes(8)), ("f8,f8", "<", bytes(16)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_a_forged_numpy_number_is_one_line(code, order, content, zipped, tmp_path):
    state = {"state_dict": Wide().state_dict(), "acc": Forged(code, order, content)}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="cannot be read"):
        import_checkpoint(tmp_path / "x.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [np.float32(0.1), np.float16(0.5), np.int32(-7), np.bool_(True), np.float64("nan")])
def test_a_numpy_number_is_read(number, tmp_path):
    from fastarat.interchange.numbers import numpy_numbers

    torch.save({"acc": number}, tmp_path / "x.pt")
    with torch.serialization.safe_globals(numpy_numbers()):
        found = torch.load(tmp_path / "x.pt", weights_only=True)["acc"]
    assert found == number or (np.isnan(number) and np.isnan(found))
    assert isinstance(found, (bool, int, float))


def changed(**entries):
    """A state dict of Wide with entries replaced, or removed (None); __ in a name stands for a dot."""
    state = Wide().state_dict()
    for key, value in entries.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "options", "words"),
    [
        (lambda: changed(extra__weight=torch.ones(3)), {}, "1 entries have no place in wrn-10-1: extra.weight"),
        (lambda: changed(lonely=torch.ones(3)), {}, "unknown entry 'lonely'"),
        (lambda: changed(bn1__bias=None), {}, "1 entries of wrn-10-1 are missing: bn1.bias"),
        (lambda: changed(fc__weight=torch.ones(7, 60)), {}, r"'fc.weight' is \[7, 60\]; wrn-10-1 expects \[7, 64\]"),
        (lambda: changed(fc__bias=torch.tensor([float("nan")] * 7)), {}, "'fc.bias' holds values that are not finite"),
        (lambda: changed(linear__bias=torch.ones(7)), {}, "both mean 'fc.bias'"),
        (lambda: changed(block2__layer__1__conv1__weight=torch.ones(32, 32, 3, 3)), {}, r"stages \(1, 2, 1\)"),
        (lambda: changed(bn1__adv__weight=torch.ones(64)) | {"bn1.base.weight": torch.ones(64)}, {}, "BatchNorm sets adv, base"),
        (lambda: changed(mu=torch.ones(3)), {}, "normalisation with mean alone"),
        (lambda: changed(mu=torch.ones(3), sigma=torch.ones(3)), {"mean": [0.5] * 3, "std": [1.0] * 3}, "its own normalisation"),
        (lambda: {"features.0.weight": torch.ones(3)}, {}, "unknown architecture .*features.0.weight"),
        (lambda: {"state_dict": {}}, {}, "no state dict"),
        (lambda: [1, 2], {}, "a list, not a state dict"),
        (lambda: ResNet18(block=PreActBlock, final_bn=False).state_dict(), {}, "without BatchNorm before the classifier"),
        (lambda: ResNet18().state_dict() | {"layer1.0.conv3.weight": torch.ones(256, 64, 1, 1)}, {}, "bottleneck"),
        (lambda: ResNet18().state_dict() | {"conv1.weight": torch.ones(64, 3, 7, 7)}, {}, "7x7"),
        (changed, {"model": "wrn-34-10"}, "holds a wrn-10-1, not a wrn-34-10"),
        (changed, {"num_classes": 10}, "has 7 classes, not 10"),
        (changed, {"epsilon": 8}, "write 8/255"),
        (changed, {"mean": [0.5]}, "both mean and std"),
        (changed, {"mean": [0.5], "std": [1.0]}, "expected 3 numbers each"),
        (changed, {"mean": [125, 122, 113], "std": [63, 62, 66]}, "write fractions, such as 125/255"),
        (changed, {"mean": [0.5] * 3, "std": [63] * 3}, "write fractions, such as 125/255"),
        (changed, {"prefer": "best"}, "leave --prefer best out"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path, state, options, words):
    with pytest.raises(UserError, match=words):
        import_checkpoint(saved(state(), tmp_path / "a.pt"), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_corrupt_and_missing_files(tmp_path):
    good = tmp_path / "a.pt"
    torch.save(Wide().state_dict(), good)
    (tmp_path / "short.pt").write_bytes(good.read_bytes()[:20_000])
    (tmp_path / "empty.pt").touch()
    for name in ("short.pt", "empty.pt"):
        with pytest.raises(UserError, match="corrupt"):
            import_checkpoint(tmp_path / name, tmp_path / "run")
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match="no checkpoint"):
            import_checkpoint(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="exists already"):
        import_checkpoint(good, tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def trained(folder, name="wrn-10-1", *, split=True, normalized=False, size=32, dataset="cifar10"):
    """A network that stands for a trained one, and its run folder as training leaves it."""
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]} if normalized else {}
    net = build_model(name, num_classes=3, **given)
    net = lived(fastarat.split_batchnorm(net) if split else net)
    meta = {"model": name, "num_classes": 3, "in_channels": 3, "image_size": size, "normalized": normalized,
            "branches": ["clean", "adv"] if split else [], "defense": "ar-at", "dataset": dataset,
            "classes": ["a", "b", "c"], "epsilon": 8 / 255, "norm": "linf", "epoch": 5}  # fmt: skip
    Run.create(folder).save_weights("last", net.state_dict(), meta)
    write_yaml(Config(dataset=dataset, model=name, data_dir=str(folder.parent / "data")), folder / "config.yaml")
    return net, folder


def loaded(file, literal=lambda: Wide(classes=3)):
    """An ordinary network with the exported weights, and the normalisation beside them, or (0, 1)."""
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    named = [(weights.pop(mean), weights.pop(std)) for mean, std in (("normalize.mean", "normalize.std"), ("mu", "sigma"))
             if mean in weights]  # fmt: skip
    plain = literal().eval()
    plain.load_state_dict(weights)
    return plain, *(named or [(0, 1)])[0]


@pytest.mark.parametrize("branch", ["adv", "clean"])
@pytest.mark.parametrize(
    ("name", "literal"),
    [("resnet18", lambda: ResNet18(3)), ("wrn-10-1", lambda: Wide(classes=3)),
     ("preactresnet18", lambda: ResNet18(3, block=PreActBlock))],
)  # fmt: skip
def test_state_dicts_load_into_an_ordinary_network(tmp_path, name, literal, branch):
    ours, run = trained(tmp_path / "run", name, size=16)
    for format in ("safetensors", "torch"):
        plain, *_ = loaded(export(run, tmp_path / f"out.{format}", format=format, branch=branch), literal)
        assert same(logits(plain), logits(ours, branch))
        assert not same(logits(plain), logits(ours, "clean" if branch == "adv" else "adv"))
    again, meta, _ = load_network(tmp_path / "out.safetensors")
    assert (meta["branches"], meta["exported_branch"]) == ([], branch)
    assert same(logits(again), logits(ours, branch))


def test_unsplit_network_and_its_only_branch(tmp_path):
    ours, run = trained(tmp_path / "run", split=False)
    plain, *_ = loaded(export(run, tmp_path / "a.pt", format="torch"))
    assert same(logits(plain), logits(ours))
    with pytest.raises(UserError, match=r"it has adv .this network has one BatchNorm set"):
        export(run, tmp_path / "b.pt", format="torch", branch="clean")
    # In and out again, the same weights.
    back = import_checkpoint(tmp_path / "a.pt", tmp_path / "back")
    assert same(logits(load_network(back)[0]), logits(ours))


def test_normalisation_is_exported_under_names_a_network_without_it_refuses(tmp_path):
    ours, run = trained(tmp_path / "run", normalized=True)
    file = export(run, tmp_path / "a.pt", format="torch")
    with pytest.raises(RuntimeError, match=r"normalize\.mean"):
        Wide(classes=3).load_state_dict(torch.load(file, weights_only=True))
    plain, mean, std = loaded(file)
    assert same(logits(plain, images=(IMAGES - mean) / std), logits(ours, "adv"))


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, run = trained(tmp_path / "run", normalized=True)
    file = export(run, tmp_path / "out.onnx", format="onnx", branch="clean")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(("out", ".out"))] == ["out.onnx"]
    session = onnxruntime.InferenceSession(str(file))
    for count in (1, 7):
        images = torch.rand(count, 3, 32, 32)
        (answer,) = session.run(["logits"], {"images": images.numpy()})
        assert same(torch.from_numpy(answer), logits(ours, "clean", images))
    assert json.loads(session.get_modelmeta().custom_metadata_map["fastarat"])["exported_branch"] == "clean"


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    _, run = trained(tmp_path / "run", split=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'fastarat\[onnx\]'"):
        export(run, tmp_path / "a.onnx", format="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("normalized", [False, True])
def test_robustbench_file_and_entry(tmp_path, monkeypatch, normalized):
    place_cifar(tmp_path / "data", monkeypatch)
    ours, run = trained(tmp_path / "run", normalized=normalized)
    record = {"settings": {"branch": "adv", "norm": "linf", "epsilon": 8 / 255, "limit": None}, "num_images": 30,
              "accuracy": {"clean_acc": 0.8412, "robust_acc_aa": 0.4901}}  # fmt: skip
    (run / "eval.json").write_text(json.dumps(record))
    file = export(run, tmp_path / "out" / "entry.pt", format="robustbench", num_images=20)
    (plain, mu, sigma), images = loaded(file), torch.rand(4, 3, 32, 32)
    assert np.shape(mu) == np.shape(sigma) == ((1, 3, 1, 1) if normalized else ())
    assert same(logits(plain, images=(images - mu) / sigma), logits(ours, "adv", images))
    text = file.with_suffix(".md").read_text()
    for words in ("**Paper title**: FILL IN", "WideResNet(depth=10, widen_factor=1, num_classes=3)", "Linf",
                  "8/255", "84.12% on 30 images (the whole test set)", "49.01%", "**Additional training data**: no",
                  "`entry.pt`", hashlib.sha256(file.read_bytes()).hexdigest(), "logits on 20 test images"):  # fmt: skip
        assert words in text, words
    assert ("`mu`" in text) == normalized


def test_robustbench_entry_takes_no_number_of_something_else(tmp_path):
    _, run = trained(tmp_path / "run", split=False)
    meta = {**load_network(run)[1], "exported_branch": "adv"}

    def numbers(**changes):
        settings = {"branch": "adv", "norm": "linf", "epsilon": 8 / 255, "limit": 10, **changes}
        record = {"settings": settings, "num_images": 10, "accuracy": {"clean_acc": 0.5}}
        (run / "eval.json").write_text(json.dumps(record))
        return exporting.measured(Run(run), "last", meta)

    clean, robust = numbers()
    assert clean == "50.00% on 10 images (NOT the whole test set)"
    assert robust.startswith("FILL IN after `fastarat eval")
    assert "another branch or budget" in numbers(branch="clean")[0]
    assert "another branch or budget" in numbers(epsilon=4 / 255)[0]
    os.utime(run / "eval.json", (1, 1))
    assert "older than the weights" in exporting.measured(Run(run), "last", meta)[0]
    (run / "eval.json").unlink()
    assert exporting.measured(Run(run), "last", meta)[0].startswith("FILL IN")


def test_robustbench_refuses_what_has_no_class_there(tmp_path):
    made = {
        "no class for resnet-small": trained(tmp_path / "small", "resnet-small", split=False),
        "32x32": trained(tmp_path / "tiny", split=False, size=16),
        r"digits has images \[1, 8, 8\]": trained(tmp_path / "digits", split=False, dataset="digits"),
    }
    runs = {words: run for words, (_, run) in made.items()}
    runs["names no data set"] = export(tmp_path / "digits", tmp_path / "plain.safetensors")
    for words, run in runs.items():
        with pytest.raises(UserError, match=words):
            export(run, tmp_path / "a.pt", format="robustbench")
    assert not (tmp_path / "a.pt").exists()
    assert not (tmp_path / "a.md").exists()


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch, format):
    _, run = trained(tmp_path / "run")
    rebuilt = exporting.rebuilt

    def altered(weights, meta):
        model = rebuilt(weights, meta)
        model.fc.bias.data[0] += 1e-3
        return model

    monkeypatch.setattr(exporting, "rebuilt", altered)
    with pytest.raises(UserError, match="logits differ"):
        export(run, tmp_path / "a.pt", format=format)
    monkeypatch.undo()
    # The wrong set's weights are caught too: the reference is the run's own network, not the copy written.
    single_branch = exporting.single_branch
    monkeypatch.setattr(exporting, "single_branch", lambda model, name: single_branch(model, "clean"))
    with pytest.raises(UserError, match="logits differ"):
        export(run, tmp_path / "a.pt", format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def cli(words):
    return main(words.split())


def test_commands_import_eval_export(tmp_path, monkeypatch, capsys):
    place_cifar(tmp_path / "data", monkeypatch)
    monkeypatch.chdir(tmp_path)
    theirs = lived(Wide(classes=3, sets=("clean", "adv")))
    saved({"state_dict": theirs.state_dict(), "epoch": 100}, tmp_path / "official.pt")
    assert cli("import official.pt --out run --dataset cifar10 --mean 0.5,0.4,0.3 --std 1/5,1/4,0.3") == 0
    text = capsys.readouterr().out
    assert "wrn-10-1, 3 classes" in text
    assert "left: epoch" in text
    assert cli("eval run --limit 10 --attack clean,pgd-2") == 0
    assert "imported, wrn-10-1" in capsys.readouterr().out
    assert cli("export run --format robustbench --images 10") == 0
    text = (tmp_path / "run/export/last-adv-robustbench.md").read_text()
    assert "an imported file does not say" in text
    assert "on 10 images (NOT the whole test set)" in text
    assert cli("export run --branch clean") == 0
    assert (tmp_path / "run/export/last-clean.safetensors").is_file()
    capsys.readouterr()
    for argv, words in (
        ("import official.pt --out other --mean x --std 1", "--mean"),
        ("export run --branch clean", "exists already"),
        ("export run --format onxx", "did you mean 'onnx'"),
    ):
        assert cli(argv) == 2, argv
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1, error
