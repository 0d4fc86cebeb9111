"""The Gluon product for few tokens: without a GPU it compiles for Hopper as it is meant to and is cut without a gap; on
a GPU it equals its definition, alone and in a chain of products of all kinds; and the table of measured choices holds
nothing that cannot run.

What `test_linear_hopper_played.py` does not play is what ptxas says: `python test_linear_hopper.py add 8` prints it.
"""

import math
import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tokenllm_kernels.gpu import linear_hopper
from tokenllm_kernels.gpu.layers import rms_norm
from tokenllm_kernels.gpu.linear import TABLE, Choice, Tiles, choice_for, product, read_table
from tokenllm_kernels.gpu.linear_hopper import Cut, StreamPlan, StreamTiling, StreamWorkspace, stream_linear

WAIT, FETCH = "griddepcontrol.wait", "cp.async.bulk.tensor"


@pytest.mark.parametrize(("kind", "block_m"), [("add", 8), ("gated", 64), ("add late", 64)])
def test_compiles_for_hopper_without_spills_and_fetches_weights_before_it_waits(kind: str, block_m: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = [sys.executable, __file__, kind, str(block_m)]
    told = subprocess.run(child, capture_output=True, text=True, env=environment, check=True).stdout
    assert f"m64n{block_m}k16" in told
    assert "0 bytes spill stores, 0 bytes spill loads" in told
    assert "serialized" not in told, "ptxas waits for each product before it issues the next"
    before, after = told[: told.index(WAIT)], told[told.index(WAIT) :]
    assert before.count(FETCH) == (2 if "gated" in kind else 1), "the weights alone are fetched before the wait"
    assert after.count(FETCH) == 1 + before.count(FETCH) + 1
    assert told.count("launch_dependents") == 1
    assert (told.index("launch_dependents") < told.index(FETCH)) == ("late" not in kind)


def what_ptxas_says(kind: str, block_m: int) -> str:
    """About the kernel with the default tiling in bfloat16, after the PTX lines that matter."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    tiling, gated, kernel = StreamTiling(), "gated" in kind, linear_hopper._stream_kernel
    layout = NVMMASharedLayout(128, 16, 2)
    types = {
        "w_desc": f"tensordesc<bf16[{tiling.block_n}, {tiling.block_k}],{layout!r}>",
        "x_desc": f"tensordesc<bf16[{block_m}, {tiling.block_k}],{layout!r}>",
        "bias": "*bf16",
        "out": "*bf16",
        "sums": "*fp32",
        "arrived": "*i32",
    }
    plan = StreamPlan.of(block_m, 8192, 4096, gated=gated, tiling=tiling, processors=132)
    constants = {
        "STAGES": plan.stages,
        "GATED": gated,
        "BIAS": not gated,
        "ADD": "add" in kind,
        "EARLY": "late" not in kind,
    }
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if "desc" not in name}
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "launch_pdl": True}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", os.devnull]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    matters = ("wgmma.mma", "griddepcontrol", FETCH)
    return "\n".join([line for line in ptx.splitlines() if any(word in line for word in matters)] + [said])


CUTS: tuple[Cut, ...] = ("anywhere", "between blocks", "evenly")


@given(
    blocks=st.integers(1, 300),
    k_tiles=st.integers(1, 120),
    processors=st.integers(1, 140),
    cut=st.sampled_from(CUTS),
)
def test_pieces_cover_all_tiles_and_sums_have_places_of_their_own(
    blocks: int, k_tiles: int, processors: int, cut: Cut
) -> None:
    tiling = StreamTiling(cut=cut)
    plan = StreamPlan.of(
        1, blocks * tiling.block_n, k_tiles * tiling.block_k, gated=False, tiling=tiling, processors=processors
    )
    first_tile, holder, slot = (getattr(linear_hopper, name).fn for name in ("_first_tile", "_holder", "_slot"))
    starts = [first_tile(program, plan.ctas, plan.tiles) for program in range(plan.ctas + 1)]
    pieces = [end - start for start, end in pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == plan.tiles == blocks * k_tiles
    assert plan.ctas <= processors
    assert min(pieces) >= 1 and max(pieces) - min(pieces) <= 1
    if cut != "anywhere" and blocks <= processors:
        assert {block * k_tiles for block in range(blocks)} <= set(starts), "a CTA has to do with one block alone"
    places, counters = [], []
    for block in range(blocks):
        tiles = range(block * k_tiles, (block + 1) * k_tiles)
        first, last = holder(tiles[0], plan.ctas, plan.tiles), holder(tiles[-1], plan.ctas, plan.tiles)
        assert starts[first] <= tiles[0] < starts[first + 1] and starts[last] <= tiles[-1] < starts[last + 1]
        if first < last:
            places += [slot(program, first) for program in range(first, last + 1)]
            counters.append(first)
    assert len(set(places)) == len(places) and all(0 <= place < 2 * plan.ctas for place in places)
    assert len(set(counters)) == len(counters)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(65, 64), torch.zeros(8, 64)),
        (torch.zeros(1, 60), torch.zeros(8, 60)),
        (torch.zeros(1, 64), torch.zeros(7, 64)),
        (torch.zeros(1, 64), torch.zeros(8, 128)),
        (torch.zeros(1, 64).half(), torch.zeros(8, 64)),
        (torch.zeros(64, 2).t(), torch.zeros(8, 64)),
    ],
)
def test_refuses_what_it_cannot_stream(x: Tensor, weight: Tensor) -> None:
    x = x if x.dtype == torch.half else x.bfloat16()
    with pytest.raises(ValueError, match=r"streamed|contiguous"):
        stream_linear(x, weight.bfloat16(), StreamTiling(), gated=True)


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, add_to: Tensor | None, gated: bool) -> Tensor:
    """In float64, gate and up rounded as if they had been stored."""
    out = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = out.to(x.dtype).double().chunk(2, dim=1)
        return functional.silu(gate) * up
    return out if add_to is None else out + add_to.double()


TILINGS = [  # a ring of a kilobyte still has two stages
    StreamTiling(),
    StreamTiling(ring_kb=1, early=False),
    StreamTiling(block_k=64, cut="evenly"),
    StreamTiling(block_n=128, cut="between blocks"),
    StreamTiling(block_k=256, ring_kb=96, early=False),
]
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of ‖out - truth‖ / ‖truth‖


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def check_twice(tokens: int, features: int, depth: int, kind: str, dtype: torch.dtype, choice: Choice) -> None:
    gated, rows = kind == "gated", features * 2 if kind == "gated" else features
    x = (torch.randn(tokens, depth, device="cuda") / math.sqrt(depth)).to(dtype)
    weight = torch.randn(rows, depth, device="cuda").to(dtype)
    bias = torch.randn(rows, device="cuda").to(dtype) if "bias" in kind else None
    for _ in range(2):  # the second finds the counters as the first left them
        held = torch.randn(tokens, features, device="cuda").to(dtype)
        expected = truth(x, weight, bias, held if "add" in kind else None, gated)
        target = held if "add" in kind else torch.full_like(held, math.nan)
        place = {"add_to" if "add" in kind else "out": target}
        assert product(x, weight, choice, bias=bias, gated=gated, **place) is target
        assert error(target, expected) <= BOUND[dtype]


SMALL = os.environ.get("KERNEL_SIZES") == "small"


@pytest.mark.hopper
@settings(max_examples=5 if SMALL else 30, deadline=None)  # each is compiled
@given(
    tokens=st.integers(1, 64) | st.sampled_from([1, 7, 16, 33, 64]),
    features=st.integers(1, 1000) | st.sampled_from([64, 1024]),
    depth=st.integers(1, 300).map(lambda eighth: 8 * eighth) | st.sampled_from([1024, 4096]),
    kind=st.sampled_from(["", "bias", "gated", "add", "bias add"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tiling=st.sampled_from(TILINGS),
    processors=st.sampled_from([1, 3, 50, 132]),
    seed=st.integers(0, 2**31),
)
def test_equals_its_definition_however_it_is_cut_and_again_right_after(
    tokens: int, features: int, depth: int, kind: str, dtype: torch.dtype, tiling: StreamTiling, processors: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    StreamWorkspace.of(torch.device("cuda", 0))  # with room for all multiprocessors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_hopper, "multiprocessors", lambda device: processors)
        check_twice(tokens, features, depth, kind, dtype, tiling)


@pytest.mark.hopper
@pytest.mark.large
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(
    ("features", "depth", "kind"),
    [(6144, 4096, ""), (4096, 14336, "add"), (14336, 4096, "gated"), (1024, 3072, "add")],
)
def test_equals_its_definition_as_models_use_it(tokens: int, features: int, depth: int, kind: str) -> None:
    torch.manual_seed(tokens)
    for choice in (StreamTiling(), StreamTiling(ring_kb=208, cut="evenly")):
        check_twice(tokens, features, depth, kind, torch.bfloat16, choice)


@pytest.mark.hopper
@pytest.mark.large
def test_products_of_all_kinds_follow_one_another_in_a_graph() -> None:
    """Each may begin before the one before it has ended, and many share the places for sums."""
    torch.manual_seed(0)
    tokens, hidden, wide, layers = 33, 1024, 2048, 12
    ways: list[Choice] = [None, Tiles(32, 128, 4, 4, 3), *TILINGS]
    gain = torch.randn(hidden, device="cuda").bfloat16()
    gate_ups = [torch.randn(2 * wide, hidden, device="cuda").bfloat16() / 32 for _ in range(layers)]
    downs = [torch.randn(hidden, wide, device="cuda").bfloat16() / 32 for _ in range(layers)]
    initial = torch.randn(tokens, hidden, device="cuda").bfloat16()

    def chain(choices: list[Choice]) -> Tensor:
        x = initial.clone()
        for i, (gate_up, down) in enumerate(zip(gate_ups, downs, strict=True)):
            fed = product(rms_norm(x, gain, 1e-5), gate_up, choices[i % len(choices)], gated=True)
            x = product(fed, down, choices[(3 * i + 1) % len(choices)], add_to=x)
        return x

    expected = chain([None])
    chain(ways)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(ways)
    found = []
    for _ in range(20):
        out.fill_(math.nan)
        graph.replay()
        found.append(out.clone())
    assert error(found[0], expected) <= 5e-2, "as near as two ways of rounding come in so many layers"
    assert all(each.equal(found[0]) for each in found)


@pytest.mark.hopper
@pytest.mark.parametrize("choice", [Tiles(32, 128, 2, 4, 3), StreamTiling()])
def test_what_is_compiled_for_a_number_of_tokens_serves_its_bucket(
    choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    weight = torch.zeros(256, 1024, device="cuda", dtype=torch.bfloat16)
    xs = torch.zeros(64, 1024, device="cuda", dtype=torch.bfloat16)
    for most in (8, 16, 32, 64):
        product(xs[:most], weight, choice)
    compiled: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what))
    for tokens in range(1, 65):
        product(xs[:tokens], weight, choice)
    assert not compiled


def measured() -> list[tuple[int, int, int, bool, dict]]:
    """Rows, depth, bucket, gated, and what the table says of them."""
    found = []
    for key, entry in read_table(TABLE).items():
        shape, bucket = key.removeprefix("gated ").split(" m")
        rows, depth = map(int, shape.split("x"))
        found.append((rows, depth, int(bucket), key.startswith("gated "), entry))
    return found


def test_the_table_holds_what_can_run() -> None:
    for rows, depth, bucket, gated, entry in measured():
        assert bucket in (8, 16, 32, 64, 128) and entry and entry.keys() <= {"few", "stream"}
        if "few" in entry:
            tiles = Tiles(*entry["few"])
            assert depth % tiles.block_k == 0
        if "stream" in entry:
            tiling = StreamTiling(*entry["stream"])
            features = rows // (1 + gated)
            assert linear_hopper.fits(bucket, rows, depth, gated) and tiling.cut in CUTS
            plan = StreamPlan.of(bucket, features, depth, gated=gated, tiling=tiling, processors=132)
            stage = ((1 + gated) * tiling.block_n + plan.block_m) * tiling.block_k * 2
            assert plan.stages * stage <= 220 * 1024


def test_the_table_is_asked_by_bucket_and_streams_where_gluon_is(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = import_module("tokenllm_kernels.gpu.linear")  # the package has a function of this name
    device, both = torch.device("cuda"), {"stream": [64, 128, 208, "evenly", True], "few": [64, 128, 1, 4, 6]}
    table = {"512x256 m8": both, "512x256 m16": {"few": [32, 128, 1, 4, 6]}, "gated 512x256 m64": both}
    monkeypatch.setattr(linear, "_measured", lambda: table)
    monkeypatch.setattr(linear, "is_hopper", lambda device: True)

    def asked(tokens: int, *, gated: bool = False, gluon: bool = True) -> Choice:
        monkeypatch.setattr(linear, "is_available", lambda device: gluon)
        return choice_for.__wrapped__(tokens, 512, 256, gated=gated, device=device)

    assert {asked(tokens) for tokens in range(1, 9)} == {StreamTiling(ring_kb=208, cut="evenly")}
    assert {asked(tokens, gluon=False) for tokens in range(1, 9)} == {Tiles(64, 128, 1, 4, 6)}
    assert {asked(tokens) for tokens in range(9, 17)} == {Tiles(32, 128, 1, 4, 6)}
    assert asked(17) is asked(129) is asked(1, gated=True) is None
    assert asked(33, gated=True) == StreamTiling(ring_kb=208, cut="evenly")


def test_without_a_choice_torch_multiplies() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    exact, out = functional.linear(x, weight, bias), torch.full((3, 6), math.nan)
    ask = partial(product, x, weight, None)
    assert torch.allclose(ask(bias=bias), exact)
    assert ask(bias=bias, out=out) is out and torch.allclose(out, exact)
    assert torch.allclose(ask(add_to=out), exact + x @ weight.t())


if __name__ == "__main__":
    print(what_ptxas_says(sys.argv[1], int(sys.argv[2])))
