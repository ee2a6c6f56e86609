"""train.py with the tests' tiny backbone, to be started as a process or by torchrun.

{rank} in an argument is the process's rank. With MAX_IMAGES in the environment, a forward pass on
more images runs out of memory.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import limit_images, use_tiny_backbone

import train
from stemgenre import cli

sys.argv = [word.replace("{rank}", os.environ.get("RANK", "0")) for word in sys.argv]
use_tiny_backbone()
if "MAX_IMAGES" in os.environ:
    limit_images(int(os.environ["MAX_IMAGES"]))
cli.run_script(train.main)
