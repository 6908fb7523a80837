"""The step inside others' loops, by the snippets of docs/python.md: Lightning with manual optimisation, accelerate."""

import re
from pathlib import Path

import pytest
import small
import torch
from beside import neighbour
from torch.utils.data import DataLoader, TensorDataset

import fastarat
from fastarat.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
IMAGES, LABELS = (torch.cat(parts) for parts in zip(*(small.batch(8, seed) for seed in range(3)), strict=True))
OPTIONS = {"example": torch.empty(2, 3, 8, 8), "epsilon": 0.1, "num_steps": 2}


def snippet(heading: str) -> str:
    """The code under a heading of the page."""
    return re.search(rf"^### {heading}\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1]


def batches() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def direct(defense: fastarat.Defense, epochs: int, precision: str = "fp32") -> list[torch.Tensor]:
    """The parameters after the same steps in a plain loop."""
    model = small.small_model()
    torch.manual_seed(1)  # of the companions' first weights
    step = fastarat.TrainStep(model, defense, **OPTIONS, precision=precision)
    for epoch in range(epochs):
        step.at(epoch=epoch + 1, progress=epoch / epochs)
        for images, labels in batches():
            step(images, labels)
    return step.parameters


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def lightning():
    return neighbour("pytorch_lightning")


def fitted(lightning, folder: Path, defense: fastarat.Defense, *, until: int = 2, resume=None, **options):
    """Fit the page's module for two epochs, or stop before; every validation evaluates, under the trainer's no_grad."""
    names = {"fastarat": fastarat}
    exec(snippet("In Lightning"), names)

    class Watched(names["Robust"]):
        def validation_step(self, batch, index):
            assert not torch.is_grad_enabled()
            self.log_dict(
                fastarat.evaluate(self.network, tuple(batch), "clean,pgd-2", epsilon=0.1, progress=False).accuracy
            )

        def on_train_epoch_end(self):
            self.trainer.should_stop = self.current_epoch + 1 == until

    trainer = lightning.Trainer(
        max_epochs=2, min_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    module = Watched(small.small_model(), defense, **OPTIONS)
    torch.manual_seed(1)
    trainer.fit(module, batches(), batches(), ckpt_path=resume)
    return trainer, module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("defense", [fastarat.ARAT(), fastarat.TRADES()], ids=lambda d: d.name)
def test_lightning(lightning, defense, precision, tmp_path):
    trainer, module = fitted(lightning, tmp_path, defense, precision=precision)
    assert (trainer.global_step, int(module.step.steps)) == (6, 6)
    assert trainer.callback_metrics.keys() > {"clean_acc", "robust_acc_pgd2"}  # and the step's terms
    assert equal(module.step.parameters, direct(defense, 2))


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_from_its_checkpoint(lightning, tmp_path):
    trainer, module = fitted(lightning, tmp_path / "a", fastarat.ARAT(), until=1)
    assert int(module.step.steps) == 3
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer, module = fitted(lightning, tmp_path / "b", fastarat.ARAT(), resume=tmp_path / "one.ckpt")
    assert (trainer.global_step, int(module.step.steps)) == (6, 6)
    assert equal(module.step.parameters, direct(fastarat.ARAT(), 2))


def test_lightning_in_half_weights_is_refused_in_one_line(lightning, tmp_path):
    with pytest.raises(UserError, match=r"conv1\.weight is torch\.bfloat16: call model\.float\(\)"):
        fitted(lightning, tmp_path, fastarat.ARAT(), precision="bf16-true")


@pytest.fixture
def accelerate():
    package = neighbour("accelerate")
    state = package.state
    for shared in (state.AcceleratorState, state.GradientState, state.PartialState):
        shared._reset_state()
    yield package
    for shared in (state.AcceleratorState, state.GradientState, state.PartialState):
        shared._reset_state()


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_accelerate(accelerate, mixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    names = {"fastarat": fastarat, "torch": torch, "network": small.small_model(), "loader": batches()}
    torch.manual_seed(1)
    exec(snippet("In accelerate").replace("epsilon=0.1", "epsilon=0.1, num_steps=2"), names)
    step, accelerator = names["step"], names["accelerator"]
    assert accelerator.mixed_precision == mixed
    assert equal(step.parameters, direct(fastarat.ARAT(), 1))

    saved = [p.clone() for p in step.parameters]
    with accelerator.autocast():
        step(*small.batch(8, 9))
    assert not equal(step.parameters, saved)
    accelerator.load_state("state")
    assert equal(step.parameters, saved)
    assert int(step.steps) == 3


def test_what_accelerate_prepared_in_mixed_precision_is_refused_in_one_line(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(small.small_model())
    with pytest.raises(UserError, match=r"^model was prepared by accelerate with mixed precision") as told:
        fastarat.TrainStep(model, fastarat.ARAT(), **OPTIONS)
    assert "\n" not in str(told.value)
    torch.manual_seed(1)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    step = fastarat.TrainStep(bare, fastarat.ARAT(), **OPTIONS, precision="bf16")
    for images, labels in batches():
        step(images, labels)
    assert equal(step.parameters, direct(fastarat.ARAT(), 1, "bf16"))
