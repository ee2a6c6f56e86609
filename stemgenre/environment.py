"""What a run was made with: versions, device, commit."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "demucs", "librosa", "numpy", "scikit-learn", "soundfile")
ROOT = Path(__file__).parents[1]


def environment(run):
    """{name: text} of versions, device and commit; `run` is the Runtime."""
    return {
        "Python": f"{platform.python_version()} on {platform.platform()}",
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": _device(run.device),
        "processes": str(run.world),
        "commit": _commit() or "not a git checkout",
    }


def _device(device):
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{device.type}, {platform.machine()}, threads: {torch.get_num_threads()}"


def _commit():
    """The commit of this checkout, with -dirty if files differ from it; None without git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    return done.stdout.strip() or None
