"""What all tests share: no network, one thread, fixed seeds, no progress bars, small checkpoints.

``tests/elsewhere.py`` runs them with other settings: QSVFT_TEST_THREADS is the number of threads, QSVFT_TEST_OFFSET
where the data begin in each file that safetensors' own writer writes, in bytes past a multiple of 64.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import random
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from placed import place_data

if "QSVFT_TEST_OFFSET" in os.environ:
    write = safetensors.torch.save_file

    def write_elsewhere(tensors, filename, metadata=None):
        write(tensors, filename, metadata)
        place_data(Path(filename), int(os.environ["QSVFT_TEST_OFFSET"]))

    safetensors.torch.save_file = write_elsewhere  # before transformers and peft take it from there

import transformers
from small_models import load, save_llama

# Whether an example is drawn in time depends on what else the machine does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
torch.set_num_threads(int(os.environ.get("QSVFT_TEST_THREADS", "1")))
transformers.utils.logging.disable_progress_bar()


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    """What is imported stays: looking through it for garbage again and again takes a fifth of a test's time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A small Llama on disk, fp32."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory):
    """The same architecture with other weights."""
    return save_llama(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def model(llama):
    """The small Llama in bf16."""
    return load(llama)
