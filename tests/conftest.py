"""Without a GPU, Triton kernels run in Triton's interpreter; the variable is read when a kernel is defined."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: compiled on the GPU when there is one, interpreted on the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
