"""The flags of `tokenllm simulate`. Imports nothing heavy: whoever starts a server reads past them."""

import argparse
from pathlib import Path

POLICIES = ("conservative", "lightllm", "past-future", "tokenllm")
ORACLE = "oracle"
FIRST_COME_ORACLE = "oracle-fcfs"
SYNTHETIC = "synthetic:"
MIXES = ("dist1", "dist2", "dist3", "chat", "o1", "four-apps")


def add_flags(parser: argparse.ArgumentParser) -> None:
    names, mixes = (*POLICIES, ORACLE, FIRST_COME_ORACLE, "all"), ", ".join(MIXES)
    parser.add_argument("--trace", required=True, metavar="FILE", help=f".csv, .jsonl, or {SYNTHETIC}NAME of {mixes}")
    parser.add_argument("--policy", choices=names, default="all", help="which to run; the oracle always runs beside it")
    parser.add_argument("--capacity", type=_positive, metavar="TOKENS", help="of KV memory (default: of the card)")
    parser.add_argument("--rate", type=_rate, metavar="X", help="arrivals times X (default: an overload by half)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of synthetic loads and of draws")
    parser.add_argument("--clock", choices=("gpu", "steps"), default="gpu", help="steps: all steps cost the same")
    parser.add_argument("--requests", type=_positive, metavar="N", help="only the first N")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here and a picture beside it")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _rate(text: str) -> float:
    if not 0 < (rate := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{rate} is not a positive number")
    return rate
