"""What all tests share: markers, one thread a process, and the way to real data."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import settings

MARKERS = {
    "slow": "takes more than about 10 s; runs when SLOW=1",
    "cuda": "needs an NVIDIA GPU",
    "browser": "needs chromium; runs when SLOW=1",
}

settings.register_profile("avdd", deadline=None, max_examples=30, print_blob=True)
settings.load_profile("avdd")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def _skip_reason(item):
    slow = bool(os.environ.get("SLOW"))
    if not slow and (item.get_closest_marker("slow") or item.get_closest_marker("browser")):
        return "slow: set SLOW=1 to run it"
    if item.get_closest_marker("cuda"):
        import torch
        return None if torch.cuda.is_available() else "there is no CUDA device here"
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := _skip_reason(item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repo():
    "The root of the working tree."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data():
    "The folder that AVDD_DATA names; the test is skipped where there is none."
    root = os.environ.get("AVDD_DATA")
    if not root: pytest.skip("set AVDD_DATA to a folder with MNIST/raw and fsdd/recordings to run this test")
    return Path(root)
