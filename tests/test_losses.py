"""What all losses share: the order of their arguments and the precision they compute in."""

import inspect

import pytest

from fastarat import losses

PUBLIC = {
    name: function
    for name, function in vars(losses).items()
    if inspect.isfunction(function) and function.__module__ == losses.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", PUBLIC)
def test_clean_comes_before_adversarial_then_the_rest_then_labels(name):
    """Swapped logits raise no error and change the result, so there is one order; hyper-parameters come last."""
    tensors, others = [], []
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        (tensors if "Tensor" in str(parameter.annotation) and parameter.default is parameter.empty else others).append(
            parameter.name
        )
    names = list(inspect.signature(PUBLIC[name]).parameters)
    assert names == tensors + others, "tensors first, then hyper-parameters"
    for clean in (n for n in tensors if n.endswith("_clean")):
        adv = clean.removesuffix("_clean") + "_adv"
        assert tensors.index(adv) == tensors.index(clean) + 1
    if "labels" in tensors:
        assert tensors[-1] == "labels"


def test_the_order_test_sees_the_losses_it_is_for():
    paired = {n for n, f in PUBLIC.items() if any(p.endswith("_adv") for p in inspect.signature(f).parameters)}
    assert paired >= {"trades", "mart", "lbgat", "ar_at_invariance", "instance_kl", "vir_weights", "conflict_aware"}
