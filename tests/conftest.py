import os
import sys
from pathlib import Path

import pytest

# No test may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run in several processes, which would each take all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All attention uses a replacement of the flash kernel, as on a CUDA device; passes can be recorded."""
    from helpers.flash_kernel import use_everywhere

    use_everywhere(monkeypatch)


@pytest.fixture
def replayed(flash_kernel: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each replayed pass."""
    from helpers.flash_kernel import count_replayed

    return count_replayed(monkeypatch)
