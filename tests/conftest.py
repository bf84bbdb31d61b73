"""Shared fixtures and marks of the test suite."""

from __future__ import annotations

import os

import torch

# Without a GPU the Triton kernels run in the interpreter, which is chosen when a kernel is decorated; so this
# has to be set before anything imports triton, and `import torch` does not.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import gc
import signal
import sys
from pathlib import Path

import pytest

# The tensors here are small: a second thread gains nothing and waits for the first on a busy machine.
torch.set_num_threads(1)
# A shell starts what runs in the background with Ctrl-C ignored, and the processes of a test inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
# The sources of this checkout, whether or not the package is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from tests.oracles import CHATML, byte_tokenizer, small_qwen3  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device")
    config.addinivalue_line("markers", "real: on pretrained weights, where their packages are installed")
    config.addinivalue_line("markers", "slow: takes long; runs with --run-slow or SAPO_RUN_SLOW=1")


def pytest_collection_modifyitems(config, items):
    run_slow = config.getoption("--run-slow") or os.environ.get("SAPO_RUN_SLOW") == "1"
    for item in items:
        if "slow" in item.keywords and not run_slow:
            item.add_marker(pytest.mark.skip(reason="slow: give --run-slow or SAPO_RUN_SLOW=1"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Each device that tests of an operator run on."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage():
    """Each trainer collects garbage twice: 0.3 s a time while it walks through half a million objects of libraries."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    # What is frozen is not freed at the end, and Triton's library says so at length.
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_trainer_before():
    """accelerate keeps one state for the whole process, with the precision of the first trainer in it."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def tiny_model():
    """A fresh Qwen3-shaped causal LM: 2 layers, hidden 48, GQA 4:2, vocabulary 259, fp32, eval mode."""
    return small_qwen3()


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, 259 ids, no chat template, eos ``<|im_end|>``, no BOS."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The same with a ChatML chat template."""
    return byte_tokenizer(chat_template=CHATML)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Every tensor that is allocated without values starts as NaN, so an element that is never written shows.

    ``new_empty``, ``torch.empty`` and ``torch.empty_like`` are replaced for Python callers; PyTorch's own
    kernels allocate as before.
    """
    plain_new, plain_empty, plain_like = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_new(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
