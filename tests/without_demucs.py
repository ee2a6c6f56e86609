"""Scripts of the repository's root with the tests' tiny backbone, as if Demucs were not installed.

python tests/without_demucs.py train.py KEY=VALUE ... then eda.py KEY=VALUE ...

They run one after the other in this process, which imports what they need once.
"""

import importlib.metadata
import itertools
import runpy
import sys
from pathlib import Path

MISSING = ("demucs", "julius", "yaml", "safetensors")  # Demucs, and what only it needs


class NotInstalled:
    """Finds no module of MISSING, wherever it is."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def version(package, *, installed=importlib.metadata.version):
    if package in MISSING:
        raise importlib.metadata.PackageNotFoundError(package)
    return installed(package)


sys.meta_path.insert(0, NotInstalled())
importlib.metadata.version = version
sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import use_tiny_backbone  # noqa: E402  (after the modules are hidden)

use_tiny_backbone()
for is_then, words in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
    if not is_then:
        sys.argv = list(words)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
