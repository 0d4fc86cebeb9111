"""How soon a long prompt's first token comes, and how many prompt tokens a second are computed, through the scheduler's
loop in this process. The floor is all products and the attention at the rate of a large GEMM, measured in the same run.

    make bench-gpu BENCH=prefill ARGS="tests/data/llama-3.1-8b-config.json"
"""

import argparse
from dataclasses import asdict, dataclass
from statistics import median

import msgspec

from driving import Drive, Started, Turn, add_engine_flags, greedy, host_times, layer_elements, random_prompt, start
from results import add_out_flag, keep, limits_line, one_plot, open_console, table_of
from timing import Limits, limits


@dataclass(frozen=True)
class Prefill:
    prompts: int
    prompt_tokens: int  # of each
    seconds: list[float]  # until the last prompt's first token
    floor_s: float

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.prompts * self.prompt_tokens / self.median_s


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser, running=64, chunk_tokens=2048)
    parser.add_argument("--cases", default="1x8192,32x1024", help="prompts x tokens of each; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of each, after one that is not counted")
    add_out_flag(parser)
    return parser.parse_args()


def prefill_flops(started: Started, prompts: int, tokens: int) -> float:
    d = started.description
    attention = 4 * tokens * tokens / 2 * d.head_dim * d.heads * d.layers
    return prompts * (2 * tokens * layer_elements(d) + 2 * d.vocab_size * d.hidden_size + attention)


def measure(started: Started, prompts: int, tokens: int, rounds: int, found: Limits) -> tuple[Prefill, list[Turn]]:
    drive = Drive(started)
    seconds = []
    for round_ in range(rounds + 1):
        first = (1 + round_) * prompts
        vocab = started.description.vocab_size
        drive.submit([greedy(uid, random_prompt(uid, tokens, vocab), 1) for uid in range(first, first + prompts)])
        seconds.append(drive.run())
    floor_s = prefill_flops(started, prompts, tokens) / found.gemm_tflop_s / 1e12
    return Prefill(prompts, tokens, seconds[1:], floor_s), drive.meter.turns


def show(cases: list[tuple[Prefill, list[Turn]]], started: Started, found: Limits, args: argparse.Namespace) -> None:
    console = open_console()
    title = f"prefill of {args.config.stem}, {started.engine.batch.prompt_tokens} tokens a step"
    headings = ("prompts", "ms p50", "least", "most", "floor ms", "ratio", "prompt tok/s", "waits", "host µs a step")
    rows = []
    for p, turns in cases:
        wait = sum(turn.seconds["wait"] for turn in turns) / sum(turn.total_s for turn in turns)
        host_us = median(turn.host_s for turn in turns) * 1e6
        ms = (p.median_s * 1e3, min(p.seconds) * 1e3, max(p.seconds) * 1e3, p.floor_s * 1e3)
        name = f"{p.prompts} x {p.prompt_tokens}"
        rows.append((name, *ms, p.median_s / p.floor_s, p.tokens_per_s, f"{wait:.1%}", host_us))
    console.print(table_of(title, headings, rows))
    console.print(limits_line(found), highlight=False)
    figure, axes = one_plot(title)
    names = [row[0] for row in rows]
    axes.bar(names, [row[1] for row in rows], label="measured")
    axes.bar(names, [row[4] for row in rows], label="floor")
    axes.set_ylabel("ms")
    axes.legend(fontsize="small")
    measured = [
        asdict(p)
        | {"tokens_per_s": p.tokens_per_s, "median_s": p.median_s, "host": msgspec.to_builtins(host_times(turns))}
        for p, turns in cases
    ]
    limits_found = {"limits": found.as_dict(), "start_s": started.start_s}
    keep(args.out, f"gpu-prefill-{args.config.stem}", limits_found | {"cases": measured}, figure)


def main() -> None:
    arguments = parse_arguments()
    shapes = [tuple(map(int, case.split("x"))) for case in arguments.cases.split(",")]
    found = limits()
    started = start(arguments, max(tokens for _, tokens in shapes) + 1)
    cases = [measure(started, prompts, tokens, arguments.rounds, found) for prompts, tokens in shapes]
    show(cases, started, found, arguments)


if __name__ == "__main__":
    main()
