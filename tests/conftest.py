"""What all tests share: no network, one thread, fixed seeds, no progress bars, small checkpoints."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import random

import numpy
import pytest
import torch
import transformers
from small_models import load, save_llama

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


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
