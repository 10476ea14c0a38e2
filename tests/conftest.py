"""Settings for all tests.

One thread a process: two busy torch processes with two threads each stall one another on small machines.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import _utils  # noqa: E402

torch.set_num_threads(1)
# How long a collected loader waits for each of its workers; in reference cycles, as a Trainer is, it waits in vain.
_utils.MP_STATUS_CHECK_INTERVAL = 0.2


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaVA with its processor on disk. All tests read the same: none may write there."""
    from training_toys import save_tiny  # imports most of the package, which few tests need

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def base(tiny_path: str) -> str:
    """The same, where adapters are put on it."""
    return tiny_path
