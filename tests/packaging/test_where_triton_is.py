"""Triton is where it must be and nowhere else: the tests run the kernels in its interpreter, a CPU serves without it,
and a GPU gets the one that its torch asks for.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
SUITE = {  # the least number of tests that `make test` must find in each, with or without a GPU
    "tests/engine/test_cuda_runner.py": 3,
    "tests/kernels/test_inputs.py": 2,
    "tests/kernels/test_linear_hopper.py": 12,
    "tests/kernels/test_linear_hopper_played.py": 1,
    "tests/kernels/test_prefill_hopper.py": 2,
    "tests/kernels/test_sampling.py": 22,
    "tests/kernels/test_triton.py": 60,
}
SERVED_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import tokenllm.cli, tokenllm.scheduler.__main__
from pathlib import Path
from tokenllm.config import ServeConfig
from tokenllm.engine.start import start_engine

config = ServeConfig(device="cpu", load_format="dummy", max_total_tokens=64)
engine = start_engine(config, Path(sys.argv[1]), lambda doing: iter)
assert engine.kv_tokens == 64
"""


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_kernels_are_tested_with_or_without_a_gpu() -> None:
    """A suite that collects nothing, or less than it did, is as red as one that fails."""
    said = run("-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "not slow", *SUITE)
    found = {path: int(number) for path, number in re.findall(r"^(\S+): (\d+)$", said, re.MULTILINE)}
    assert found.keys() == SUITE.keys()
    assert {path: number for path, number in found.items() if number < SUITE[path]} == {}


@pytest.mark.parametrize(
    "how", ["@pytest.mark.skip\ndef test(): pass", "def test(): pytest.skip()", "pytest.importorskip('nowhere')"]
)
def test_a_skipped_test_fails(how: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "test_it.py").write_text(f"import pytest\n{how}\n")
    with pytest.raises(AssertionError, match="no test may be skipped"):
        run("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path)


def test_a_cpu_serves_without_it(tmp_path: Path) -> None:
    run("-c", SERVED_WITHOUT_TRITON, write_tiny_model(tmp_path))


def test_it_is_pinned_together_with_torch_and_for_cpus_alone() -> None:
    def pinned(file: str) -> set[str]:
        return set(re.findall(r"^([\w-]+)==", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))

    assert pinned("constraints-cpu.txt") == {"torch", "triton"}
    assert not [name for name in pinned("constraints.txt") if re.match("torch|triton|nvidia|cuda", name)]
