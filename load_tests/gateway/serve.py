"""`tokenllm serve` with the fake engine: its settings are a JSON argument."""

import sys
from pathlib import Path

import msgspec

from tokenllm.config import ServeConfig
from tokenllm.supervisor.serve import serve

if __name__ == "__main__":
    settings = msgspec.json.decode(sys.argv[1], type=ServeConfig)
    sys.exit(serve(settings, (sys.executable, str(Path(__file__).with_name("fake_engine.py")))))
