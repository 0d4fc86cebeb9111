"""The embedded model in both CPU precisions, a driver that feeds it requests, and transformers as the oracle."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import LlamaConfig, LlamaForCausalLM

from tokenllm.checkpoint.description import describe
from tokenllm.engine.runner import CpuRunner, Runner
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import Sampling, Submit, TokenLogprob
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Precision, load_decoder, open_weights
from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.router import Router
from tokenllm.scheduler.scheduler import Scheduler

CPU = torch.device("cpu")
SLOTS, ROWS, CONTEXT = 8192, 32, 1024


class Driver:
    """Runs requests on a runner, each from a step of its own, and keeps what they were told."""

    def __init__(self, runner: Runner[Any], margin: float, tolerance: float) -> None:
        self.runner = runner
        self.margin, self.tolerance = margin, tolerance  # of the precision: what is a near-tie, how far logprobs may be
        self.memory = TokenMemory(SLOTS)
        self.vectors: dict[int, np.ndarray] = {}  # of the newest run

    def run(self, submits: Sequence[tuple[int, Submit]], chunk: int = 200) -> list[list[TokenLogprob]]:
        books, self.vectors = self._books(chunk), {}
        told: list[list[TokenLogprob]] = [[] for _ in submits]
        last, step = max(since for since, _ in submits), 0
        while step <= last or books.rows.running:
            for uid, (since, submit) in enumerate(submits):
                if since == step:
                    books.accept(replace(submit, uid=uid))
            if planned := books.plan():
                sampled = self.runner.collect(self.runner.launch(planned.plan))
                step_told = books.settle(planned, sampled)
                self.vectors.update(sampled.vectors)
                for uid, tokens in (*step_told.prompt_logprobs.items(), *step_told.logprobs.items()):
                    told[uid] += tokens
            step += 1
        return told

    def _books(self, chunk: int) -> Scheduler:
        return Scheduler(
            self.memory,
            Router(WorstCase(), None, ROWS),
            rows=ROWS,
            max_positions=CONTEXT,
            prefill_chunk_tokens=chunk,
            most_chunks=self.runner.most_chunks,
            most_context_tokens=self.runner.most_context_tokens,
            max_queued_requests=0,
            max_queued_tokens=0,
            eos_ids=frozenset(),
        )


def submit(ids: Sequence[int], max_tokens: int, **sampling: Any) -> Submit:
    rule = Sampling(**({"seed": 0, "temperature": 0.0, "logprobs": 5} | sampling))
    return Submit(0, np.asarray(ids, dtype="<i4").tobytes(), max_tokens, rule, ignore_eos=True)


@pytest.fixture(name="submit", scope="session")
def submit_fixture() -> Callable[..., Submit]:
    return submit


@pytest.fixture(scope="session", params=["float32", "auto"] + ["cuda float32"] * torch.cuda.is_available())
def driver(request: pytest.FixtureRequest, default_model: Path) -> Driver:
    description, device = describe(default_model), torch.device("cuda" if "cuda" in request.param else "cpu")
    source = open_weights(default_model, description, device, dummy=False, dtype=torch.float32)
    precision = Precision(torch.float32, half_weights=request.param == "auto")
    decoder = load_decoder(source, description, precision, device, CONTEXT)
    return Driver(_runner(decoder), *((0.03, 0.02) if request.param == "auto" else (0.001, 1e-3)))


def _runner(decoder: Decoder) -> Runner[Any]:
    if not decoder.embedding.is_cuda:
        return CpuRunner(decoder, SLOTS, ROWS, CONTEXT)
    from tokenllm.engine.cuda_start import start_cuda

    return start_cuda(decoder, ROWS, CONTEXT, CONTEXT, SLOTS, lambda doing: iter)[0]


@pytest.fixture(scope="session")
def oracle(default_model: Path) -> LlamaForCausalLM:
    """transformers' model with the weights of the GGUF, dequantized, in float32."""
    d = describe(default_model)
    config = LlamaConfig(
        hidden_size=d.hidden_size,
        intermediate_size=d.intermediate_size,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        vocab_size=d.vocab_size,
        rms_norm_eps=d.rms_norm_eps,
        max_position_embeddings=d.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    source = open_weights(default_model, d, CPU, dummy=False, dtype=torch.float32)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: source.get(name, shapes[name]) for name in names}, strict=False)
    model.tie_weights()
    return model
