"""Threads of the tests' processes; which of them import the fixtures."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch.compile starts no processes


def pytest_configure(config):
    """Fixtures are imported, and PyTorch with them, where tests run: not by xdist's controller."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
