"""The load generator is a folder of scripts, not part of the package: its tests find it by path."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "load_tests"), str(Path(__file__).parent)]
