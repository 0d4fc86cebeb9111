"""Find how every product of the given models is best computed in each bucket of tokens, and write `linear_h100.json`.

A kernel shares the card with the end of the one before it and the beginning of the one after it, so what is quickest
alone is not so in a layer. Here candidates are judged by the time of some layers, in turns with the best so far: first
one way for all products, then product by product. The table begins as it is installed, or as an earlier run left it in
--out, so that models can be done one by one; it is written after each bucket.

    PYTHONPATH=src:kernels:api_schemas:load_tests/gpu python load_tests/gpu/tune_linear.py CONFIG.json … --out FILE
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import triton
from rich.progress import track
from torch import Tensor

from timing import error, give_back_memory
from tokenllm_kernels.gpu.decode_attention import DecodePlan, DecodeTiling, decode_attention, plan_decode
from tokenllm_kernels.gpu.device import multiprocessors
from tokenllm_kernels.gpu.layers import rms_norm, rope_and_store
from tokenllm_kernels.gpu.linear import SPLIT_WORKSPACE, TABLE, Choice, Tiles, key_of, product, read_table
from tokenllm_kernels.gpu.linear_hopper import StreamPlan, StreamTiling, fits, is_available

TOKENS = {8: (1, 8), 16: (16,), 32: (32,), 64: (64,), 128: (128,)}  # of each bucket, those that are timed
FEW = [  # block_n, block_k, splits, warps; with as many stages as there is room for
    (64, 128, 1, 4),
    (64, 256, 1, 4),
    (64, 128, 2, 4),
    (64, 256, 2, 4),
    (64, 256, 4, 4),
    (32, 128, 2, 4),
    (32, 256, 4, 4),
    (128, 128, 1, 8),
]
STREAM = [
    StreamTiling(64, 128, 160, "anywhere"),
    StreamTiling(64, 128, 208, "anywhere"),
    StreamTiling(64, 256, 160, "anywhere"),
    StreamTiling(64, 128, 160, "anywhere", early=False),
    StreamTiling(64, 128, 208, "between blocks"),
    StreamTiling(64, 256, 208, "between blocks"),
    StreamTiling(64, 128, 208, "between blocks", early=False),
    StreamTiling(64, 128, 208, "evenly"),
    StreamTiling(64, 128, 160, "evenly"),
    StreamTiling(64, 256, 208, "evenly"),
]
SHARED_MEMORY = 220_000
MOST_STAGES = 6
LAYERS = 8
HEADS = 2  # copies of the last product
CONTEXT = 32  # tokens that attention sees: the products are what counts
EPS = 1e-5
ROUNDS = 2
STEP, ENOUGH = 0.997, 0.995  # of the time before: what takes a step in the search, and what is worth a new entry
TRIALS = ((4, 1.003), (12, STEP), (24, STEP))  # replays, and the share of the champion's time to stay below
FINAL_REPLAYS = 40
APART = 5e-2  # ‖out - cuBLAS's‖ / ‖cuBLAS's‖ after some layers in bfloat16
POOL_PROCESSES = 14

Choices: TypeAlias = dict[str, Choice]  # by the name of the product
Table: TypeAlias = dict[str, dict[str, list[Any]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    features: int  # rows of the weight
    depth: int
    gated: bool

    def key(self, bucket: int) -> str:
        return key_of(self.features, self.depth, bucket, gated=self.gated)

    def plan(self, bucket: int, tiling: StreamTiling) -> StreamPlan:
        features, processors = self.features // (1 + self.gated), multiprocessors(torch.device("cuda"))
        return StreamPlan.of(bucket, features, self.depth, gated=self.gated, tiling=tiling, processors=processors)


@dataclass(frozen=True)
class Model:
    """The numbers of a decoder that its products depend on."""

    name: str
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @staticmethod
    def of(path: Path) -> "Model":
        return Model.of_config(path.name.removesuffix("-config.json"), json.loads(path.read_text(encoding="utf-8")))

    @staticmethod
    def of_config(name: str, config: dict) -> "Model":
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim, kv_heads = config.get("head_dim") or hidden // heads, config["num_key_value_heads"]
        return Model(name, hidden, config["intermediate_size"], heads, kv_heads, head_dim, config["vocab_size"])

    def layer(self) -> dict[str, Shape]:
        return {
            "qkv": Shape((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden, False),
            "o": Shape(self.hidden, self.heads * self.head_dim, False),
            "gate_up": Shape(2 * self.wide, self.hidden, True),
            "down": Shape(self.hidden, self.wide, False),
        }

    def last(self) -> dict[str, Shape]:
        return {"head": Shape(self.vocab, self.hidden, False)}


ADDING = ("o", "down")


def shapes_of(config: dict) -> list[Shape]:
    model = Model.of_config("", config)
    return [*model.layer().values(), *model.last().values()]


# ---- candidates ----


def options(shape: Shape, bucket: int, table: Table) -> list[Choice]:
    """Some ways to compute it: cuBLAS, what the table has for any number of tokens, and what was good elsewhere."""
    known = [Tiles(*entry["few"]) for b in TOKENS if "few" in (entry := table.get(shape.key(b), {}))]
    few = [tiles for tiles in known if stages_of(shape, bucket, tiles.block_n, tiles.block_k) >= tiles.stages]
    return list(dict.fromkeys([None, *few, *few_options(shape, bucket), *stream_options(shape, bucket)]))


def stages_of(shape: Shape, bucket: int, block_n: int, block_k: int) -> int:
    """That fit in shared memory."""
    return SHARED_MEMORY // ((block_n * (1 + shape.gated) + max(16, bucket)) * block_k * 2)


def few_options(shape: Shape, bucket: int) -> Iterator[Tiles]:
    """Tiles that fit in shared memory and give the card something to do."""
    features = shape.features // (1 + shape.gated)
    for block_n, block_k, splits, warps in FEW:
        programs = triton.cdiv(features, block_n) * splits
        stages = min(MOST_STAGES, stages_of(shape, bucket, block_n, block_k))
        sums = programs * block_n * max(16, bucket) * (1 + shape.gated)
        busy = programs >= 48 and (splits == 1 or (programs <= 600 and sums <= SPLIT_WORKSPACE))
        if stages >= 2 and busy and shape.depth % block_k == 0 and shape.depth // splits >= block_k:
            yield Tiles(block_n, block_k, splits, warps, stages)


def stream_options(shape: Shape, bucket: int) -> list[StreamTiling]:
    """Without those that come to the same."""
    if not streams(shape, bucket):
        return []
    distinct = {(t.block_n, t.block_k, t.early, shape.plan(bucket, t)): t for t in reversed(STREAM)}
    return list(reversed(distinct.values()))


def streams(shape: Shape, bucket: int) -> bool:
    return is_available(torch.device("cuda")) and fits(bucket, shape.features, shape.depth, shape.gated)


# ---- compiling ----


@dataclass(frozen=True)
class Job:
    """Of a process that fills Triton's cache."""

    shape: Shape
    adds: bool
    bucket: int
    choice: Tiles | StreamTiling

    def compiled(self) -> object:
        """The same for jobs that want the same kernel."""
        if isinstance(self.choice, Tiles):
            part: object = replace(self.choice, splits=min(self.choice.splits, 2)), max(16, self.bucket)
        else:
            plan, tiling = self.shape.plan(self.bucket, self.choice), self.choice
            part = tiling.block_n, tiling.block_k, tiling.early, plan.block_m, plan.stages
        return self.shape.gated, self.adds, part


def compile_one(job: Job | Model) -> None:
    if isinstance(job, Model):
        weights = {name: empty(shape.features, shape.depth) for name, shape in job.layer().items()}
        for tokens in chain.from_iterable(TOKENS.values()):
            Chain.of(job, tokens, [weights]).run(dict.fromkeys(weights))
        return
    shape, tokens = job.shape, job.bucket
    x, weight = empty(tokens, shape.depth), empty(shape.features, shape.depth)
    out = x.new_empty(tokens, shape.features // (1 + shape.gated))
    product(x, weight, job.choice, gated=shape.gated, **{"add_to" if job.adds else "out": out})


def compile_all(jobs: Iterable[Job | Model]) -> None:
    """At once, in a pool of processes; Triton's cache hands them on."""
    distinct = list({job.compiled() if isinstance(job, Job) else job: job for job in jobs}.values())
    if len(distinct) > POOL_PROCESSES:
        with ProcessPoolExecutor(POOL_PROCESSES, mp_context=get_context("spawn")) as pool:
            list(track(pool.map(compile_one, distinct), "compiling", total=len(distinct), transient=True))


def jobs_of(model: Model, buckets: Sequence[int], table: Table) -> Iterator[Job | Model]:
    yield model
    for name, shape in (model.layer() | model.last()).items():
        for bucket in buckets:
            for choice in [chosen(table, shape, bucket), *options(shape, bucket, table)]:
                if choice is not None:
                    yield Job(shape, name in ADDING, bucket, choice)


# ---- what is timed ----


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def random_case(shape: Shape, tokens: int, copies: int) -> tuple[Tensor, list[Tensor]]:
    return random(tokens, shape.depth), [random(shape.features, shape.depth, scale=0.02) for _ in range(copies)]


class Work(Protocol):
    def run(self, choices: Choices) -> Tensor:
        """Launch it, and return what comes out."""
        ...


@dataclass(frozen=True)
class Chain:
    """Layers of a decoder at decode, with short contexts that all layers share."""

    weights: list[dict[str, Tensor]]  # of each layer
    initial: Tensor
    residual: Tensor
    gain: Tensor
    heads: int
    rope: Tensor
    slots: Tensor
    index: Tensor
    kv: Tensor
    plan: DecodePlan

    @staticmethod
    def of(model: Model, tokens: int, weights: list[dict[str, Tensor]]) -> "Chain":
        device, heads, kv_heads, head_dim = torch.device("cuda"), model.heads, model.kv_heads, model.head_dim
        tiling = DecodeTiling.of(torch.bfloat16, head_dim, device)
        plan = DecodePlan.empty(tokens, heads, kv_heads, head_dim, tiling, device)
        plan.lengths.fill_(CONTEXT)
        plan.rows.copy_(torch.arange(tokens))
        plan_decode(plan, tokens, kv_heads)
        index = torch.randperm(tokens * CONTEXT, device=device).int().view(tokens, CONTEXT)
        angles = torch.randn(tokens, head_dim, device=device)
        rope, kv = torch.stack((angles.cos(), angles.sin()), 1), random(tokens * CONTEXT + 1, kv_heads, 2, head_dim)
        initial, gain = random(tokens, model.hidden), random(model.hidden)
        last = index[:, -1].contiguous()
        return Chain(weights, initial, initial.clone(), gain, heads, rope, last, index, kv, plan)

    def attend(self, qkv: Tensor) -> Tensor:
        q = rope_and_store(qkv, self.rope, self.kv, self.slots, self.heads)
        out = q.new_empty(q.shape)
        decode_attention(q, self.kv, self.index, self.plan, out)
        return out.flatten(1)

    def run(self, choices: Choices) -> Tensor:
        x = self.residual.copy_(self.initial)
        for layer in self.weights:
            qkv = product(rms_norm(x, self.gain, EPS), layer["qkv"], choices["qkv"])
            product(self.attend(qkv), layer["o"], choices["o"], add_to=x)
            fed = product(rms_norm(x, self.gain, EPS), layer["gate_up"], choices["gate_up"], gated=True)
            product(fed, layer["down"], choices["down"], add_to=x)
        return x


@dataclass(frozen=True)
class Head:
    """The last product, again and again."""

    x: Tensor
    weights: list[Tensor]
    out: Tensor

    @staticmethod
    def of(model: Model, tokens: int, weights: list[Tensor]) -> "Head":
        return Head(random(tokens, model.hidden), weights, random(tokens, model.vocab))

    def run(self, choices: Choices) -> Tensor:
        for weight in self.weights:
            product(self.x, weight, choices["head"], out=self.out)
        return self.out


# ---- the judge ----


@dataclass(frozen=True)
class Candidate:
    choices: Choices
    graphs: list[torch.cuda.CUDAGraph]  # one of each work


class Judge:
    """Makes graphs of some works with choices, and times them against each other."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works, self._pool, self._stream = works, torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def candidate(self, choices: Choices) -> Candidate:
        for work in self._works:
            work.run(choices)
        return Candidate(choices, [self._captured(work, choices) for work in self._works])

    def _captured(self, work: Work, choices: Choices) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):  # not `torch.cuda.graph`, which first empties the cache, a thousand times
            graph.capture_begin(pool=self._pool)
            work.run(choices)
            graph.capture_end()
        graph.replay()  # the first sends it to the device
        return graph

    def times_us(self, candidates: Sequence[Candidate], replays: int) -> list[float]:
        """Of each the median, replayed in turns, so that all meet the same clocks; the sum over the works."""
        marks: list[list[list[tuple[Any, Any]]]] = [[[] for _ in each.graphs] for each in candidates]
        for _ in range(replays):
            for each, of_each in zip(candidates, marks, strict=True):
                for graph, found in zip(each.graphs, of_each, strict=True):
                    found.append(_replayed(graph))
        torch.cuda.synchronize()
        return [sum(median(a.elapsed_time(b) for a, b in found) for found in of_each) * 1000 for of_each in marks]

    def better(self, challenger: Candidate, champion: Candidate) -> bool:
        """In every trial: one in some hundred looks better than it is."""

        def passes(replays: int, share: float) -> bool:
            ours, theirs = self.times_us([challenger, champion], replays)
            return ours < share * theirs

        return all(passes(replays, share) for replays, share in TRIALS)

    def apart(self, choices: Choices) -> float:
        """The largest distance from what cuBLAS says."""
        cublas: Choices = dict.fromkeys(choices)
        return max(error(work.run(choices).clone(), work.run(cublas)) for work in self._works)


def _replayed(graph: torch.cuda.CUDAGraph) -> tuple[Any, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    return start, end


def descend(
    start: T,
    ways: dict[str, list[Choice]],
    together: Sequence[Choices],
    changed: Callable[[T, Choices], T],
    better: Callable[[T, T], bool],
) -> T:
    """From `start` by the changes that are better: of all products at once, then of one after the other."""
    changes = [list(together)] + ROUNDS * [[{name: way} for name, some in ways.items() for way in some]]
    champion = start
    for each in changes:
        before = champion
        for change in each:
            challenger = changed(champion, change)
            champion = challenger if better(challenger, champion) else champion
        if champion is before and each is not changes[0]:
            break
    return champion


@dataclass(frozen=True)
class Verdict:
    old_us: float
    new_us: float
    old: Choices
    new: Choices

    def row(self, what: str) -> str:
        gain = f"{what:8} {self.old_us:7.1f} → {self.new_us:7.1f} µs  {self.new_us / self.old_us - 1:+6.1%}"
        return "\n".join(
            [gain, *(f"    {name:8} {said(self.old[name])} → {said(new)}" for name, new in self.changed())]
        )

    def changed(self) -> list[tuple[str, Choice]]:
        return [(name, choice) for name, choice in self.new.items() if choice != self.old[name]]


def said(choice: Choice) -> str:
    if choice is None:
        return "cuBLAS"
    return f"{'few' if isinstance(choice, Tiles) else 'stream'} {','.join(map(str, astuple(choice)))}"


def tune(works: Sequence[Work], shapes: dict[str, Shape], bucket: int, table: Table) -> Verdict:
    judge = Judge(works)
    ways = {name: options(shape, bucket, table) for name, shape in shapes.items()}
    able = all(streams(shape, bucket) for shape in shapes.values())
    together: list[Choices] = [dict.fromkeys(shapes, tiling) for tiling in STREAM] if able else []
    old = judge.candidate({name: chosen(table, shape, bucket) for name, shape in shapes.items()})

    def changed(champion: Candidate, change: Choices) -> Candidate:
        choices = champion.choices | change
        return champion if choices == champion.choices else judge.candidate(choices)

    def better(challenger: Candidate, champion: Candidate) -> bool:
        return challenger is not champion and judge.better(challenger, champion)

    new = descend(old, ways, together, changed, better)
    old_us, new_us = judge.times_us([old, new], FINAL_REPLAYS)
    if new_us >= ENOUGH * old_us:
        return Verdict(old_us, old_us, old.choices, old.choices)
    if not (apart := judge.apart(new.choices)) < APART:
        raise ValueError(f"{ {name: said(choice) for name, choice in new.choices.items()} }: {apart:.1e} from cuBLAS")
    return Verdict(old_us, new_us, old.choices, new.choices)


# ---- the table ----


def chosen(table: Table, shape: Shape, bucket: int) -> Choice:
    entry = table.get(shape.key(bucket), {})
    if "stream" in entry and streams(shape, bucket):
        return StreamTiling(*entry["stream"])
    return Tiles(*entry["few"]) if "few" in entry else None


def with_choice(table: Table, key: str, choice: Choice) -> Table:
    """Tiles stay beside a stream, for where Gluon is not."""
    match choice:
        case None:
            return {other: entry for other, entry in table.items() if other != key}
        case Tiles():
            return table | {key: {"few": list(astuple(choice))}}
        case StreamTiling():
            return table | {key: table.get(key, {}) | {"stream": list(astuple(choice))}}


def write(table: Table, path: Path) -> None:
    """An entry a line."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry, sort_keys=True)}" for key, entry in ordered(table))
    path.write_text(f'{{\n "choices": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


def ordered(table: Table) -> list[tuple[str, dict[str, list[Any]]]]:
    """Shapes as they came, their buckets by size."""
    shapes = {key: i for i, key in enumerate(dict.fromkeys(key.split(" m")[0] for key in table))}
    return sorted(table.items(), key=lambda item: (shapes[item[0].split(" m")[0]], int(item[0].split(" m")[1])))


def tune_model(model: Model, buckets: Sequence[int], table: Table) -> Iterator[Table]:
    """The table with what was found for this model, after each bucket."""
    layer, last, found = model.layer(), model.last(), table
    weights = [{name: random_case(s, 1, 1)[1][0] for name, s in layer.items()} for _ in range(LAYERS)]
    heads = random_case(last["head"], 1, HEADS)[1]
    for bucket in buckets:
        began = time.monotonic()
        chains = [Chain.of(model, tokens, weights) for tokens in TOKENS[bucket]]
        ends = [Head.of(model, tokens, heads) for tokens in TOKENS[bucket]]
        count = len(TOKENS[bucket])
        verdicts = [
            ("layer", layer, tune(chains, layer, bucket, table), LAYERS * count),
            ("head", last, tune(ends, last, bucket, table), HEADS * count),
        ]
        print(f"{model.name}, {bucket} tokens, took {time.monotonic() - began:.1f} s")
        for what, shapes, v, parts in verdicts:
            print("  " + replace(v, old_us=v.old_us / parts, new_us=v.new_us / parts).row(what), flush=True)
            for name, choice in v.changed():
                found = with_choice(found, shapes[name].key(bucket), choice)
        give_back_memory()
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", choices=TOKENS, default=list(TOKENS), help="buckets")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    models, table = [Model.of(path) for path in arguments.configs], read_table(TABLE)
    if arguments.out.exists():
        table = read_table(arguments.out)
    began = time.monotonic()
    compile_all(job for model in models for job in jobs_of(model, arguments.tokens, table))
    print(f"{torch.cuda.get_device_name()}, compiled in {time.monotonic() - began:.0f} s; µs of one layer, of one head")
    for model in models:
        began = time.monotonic()
        for found in tune_model(model, arguments.tokens, table):
            write(table := found, arguments.out)
        print(f"{model.name}: {time.monotonic() - began:.0f} s, written to {arguments.out}", flush=True)
        give_back_memory()


if __name__ == "__main__":
    main()
