"""From the start of the process to the first answer, with real files: writes random weights of a config's shape as the
hub has them, once, and starts `tokenllm serve` on them. What was just written is in the page cache; the first start
also fills Triton's. Flags that are not its own go to the server.

    make bench-gpu BENCH=startup ARGS="tests/data/llama-3.1-8b-config.json --folder /tmp/llama-3.1-8b"
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from model_folder import write_model_folder, write_random_weights
from results import add_out_flag, keep, open_console, table_of
from served import Served, served
from timing import give_back_memory


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", type=Path, help="config.json of the model's shape")
    add("--folder", type=Path, required=True, help="of the model; weights that it already has are used")
    add("--device", default="cuda", help="default: %(default)s")
    add("--starts", type=int, default=2, help="default: %(default)s")
    add_out_flag(parser)
    return parser.parse_known_args()


def start(folder: Path, flags: list[str], log: Path) -> Served:
    with served(folder, flags, log) as server:
        return server


def main() -> None:
    arguments, flags = parse_arguments()
    name, console = f"gpu-startup-{arguments.config.stem}", open_console()
    began = time.monotonic()
    folder = write_model_folder(arguments.config, arguments.folder)
    total = write_random_weights(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    give_back_memory()
    console.print(f"{total / 1e9:.1f} GB of weights in {folder} after {time.monotonic() - began:.1f} s")
    flags = ["--device", arguments.device, *flags]
    starts = [start(folder, flags, arguments.out / f"{name}-{n}.log") for n in range(arguments.starts)]
    rows = [(n + 1, found.ready_s, found.first_answer_s) for n, found in enumerate(starts)]
    title = f"start of {arguments.config.stem}, {total / 1e9:.1f} GB of safetensors in the page cache"
    console.print(table_of(title, ("start", "ready after s", "first token after s"), rows))
    keep(arguments.out, name, {"bytes": total, "flags": flags, "starts": [asdict(found) for found in starts]})


if __name__ == "__main__":
    main()
