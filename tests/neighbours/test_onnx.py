"""The exported graph in onnxruntime: a trained network's answers on real and on adversarial images; timm's networks."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from beside import EPSILON, neighbour
from onnx import numpy_helper

import fastarat
from fastarat.attacks import PGD
from fastarat.config import Config, write_yaml
from fastarat.interchange import export
from fastarat.nets.models import build_model
from fastarat.runs import Run, load_network


def answers(model: onnx.ModelProto, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_a_trained_network(digits_run, digits, tmp_path):
    graph = onnx.load(export(digits_run, tmp_path / "a.onnx", format="onnx"))
    model, (images, labels) = load_network(digits_run)[0], digits
    attack = PGD(model, epsilon=EPSILON, step_size=EPSILON / 4, num_steps=10)
    for shown in (images, attack(images, labels).images):
        with torch.no_grad():
            logits = model(shown)
        found = answers(graph, shown)
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert (found.argmax(1) == labels).sum() == (logits.argmax(1) == labels).sum()

    # A graph with one weight disturbed is told apart.
    weight = max(graph.graph.initializer, key=lambda held: np.prod(held.dims))
    array = numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    assert (answers(graph, shown) - logits).abs().max() > 1e-4 * logits.abs().max()


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_networks_of_timms(name, tmp_path):
    """Split where they can be, normalisation inside: the one format that holds both."""
    neighbour("timm")
    net = build_model(name, num_classes=4, image_size=32, mean=[0.5] * 3, std=[0.2] * 3)
    split = name == "timm:test_resnet"
    net = fastarat.split_batchnorm(net) if split else net
    meta = {"model": name, "num_classes": 4, "in_channels": 3, "image_size": 32, "normalized": True,
            "branches": ["clean", "adv"] if split else [], "defense": "at", "dataset": "cifar10",
            "classes": list("abcd"), "epsilon": 8 / 255, "norm": "linf", "epoch": 5}  # fmt: skip
    Run.create(tmp_path / "run").save_weights("last", net.state_dict(), meta)
    write_yaml(Config(dataset="cifar10", model=name), tmp_path / "run" / "config.yaml")
    graph = onnx.load(export(tmp_path / "run", tmp_path / "a.onnx", format="onnx"))
    images = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        logits = net.eval()(images)
    assert (answers(graph, images) - logits).abs().max() <= 1e-5 * logits.abs().max()
