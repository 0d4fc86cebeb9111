"""The scheduler process: loads the model, tells the circle that it is ready, and serves until it is killed."""

import gc
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.source import cache_folder
from tokenllm.config import SchedulerBirth, ServeConfig
from tokenllm.counters import Page
from tokenllm.engine.start import DeviceFault, Engine, device_faults, start_engine
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import Inbound, Midway, Ready
from tokenllm.models.weights import Track
from tokenllm.process import die_with, read_birth
from tokenllm.ring import Receiver, Sender
from tokenllm.routing.learned_pace import LearnedPace
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.policy import make_policy
from tokenllm.routing.router import Router
from tokenllm.scheduler.history import History
from tokenllm.scheduler.loop import Loop
from tokenllm.scheduler.scheduler import Scheduler


def main() -> None:
    birth = read_birth(SchedulerBirth)
    die_with(birth.supervisor_pid)
    engine = _load(birth.config, Path(birth.model_path))
    inboxes = [Receiver[Inbound](fds, Inbound) for fds in birth.inboxes]
    outbox = Sender[Midway](birth.outbox)
    ready = Ready(birth.generation, engine.kv_tokens, engine.max_model_len)
    history = History(cache_folder(), Path(birth.model_path))
    scheduler = scheduler_for(birth.config, engine, history.lengths)
    loop = Loop(scheduler, engine.runner, inboxes, outbox, Page(birth.page_fd), ready, history)
    gc.collect()
    gc.freeze()  # no collection walks again through what lives as long as the process: torch alone takes 100 ms
    try:
        with device_faults():
            loop.serve()
    except DeviceFault as fault:
        sys.exit(f"tokenllm: {fault}")


def _load(config: ServeConfig, path: Path) -> Engine:
    console = Console(stderr=True)
    console.print(f"tokenllm: loading {path}", highlight=False, soft_wrap=True)

    def progress(doing: str) -> Track[int]:
        return lambda parts: iter(track(parts, description=doing, console=console, transient=True))

    try:
        with device_faults():
            return start_engine(config, path, progress)
    except (CheckpointError, DeviceFault, ValueError, MemoryError) as error:
        sys.exit(f"tokenllm: the model cannot be served: {error}")


def scheduler_for(config: ServeConfig, engine: Engine, lengths: Lengths) -> Scheduler:
    pace = LearnedPace(engine.batch.prompt_tokens)
    policy = make_policy(config.policy, pace, engine.kv_tokens, lengths)
    return Scheduler(
        TokenMemory(engine.kv_tokens),
        Router(policy, pace, engine.batch.rows),
        rows=engine.batch.rows,
        max_positions=engine.max_model_len,
        prefill_chunk_tokens=engine.batch.prompt_tokens,
        most_chunks=engine.runner.most_chunks,
        most_context_tokens=engine.runner.most_context_tokens,
        filled=engine.runner.filled,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        eos_ids=engine.eos_ids,
        pace=pace,
    )


if __name__ == "__main__":
    main()
