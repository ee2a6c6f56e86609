"""train.py with the tests' tiny backbone, to be started by torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import use_tiny_backbone

import train
from stemgenre import cli

use_tiny_backbone()
cli.run_script(train.main)
