"""The numbers of the whole server: one table names them, and every process keeps its own in a shared page.

A page is a piece of nameless shared memory (memfd) with one float64 for each entry of the table, and for each bucket
of a histogram. One process writes a page and any process reads it; a page outlives its process, whose successor
counts on. It relies on aligned 8-byte stores being whole: a reader may see a histogram's bucket before its sum.
"""

import mmap
import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import msgspec


class Metric(msgspec.Struct, frozen=True):
    """One line of the table. A name without `labels` has one value, which goes by the empty label."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    label: str = ""  # what the labels tell apart
    labels: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()  # upper bounds, included; what is above the last has a bucket of its own


METRICS = (
    Metric("tokenllm_kv_tokens_capacity", "gauge", "Token slots of the KV memory."),
    Metric("tokenllm_kv_tokens_free", "gauge", "Token slots that nobody holds."),
    Metric("tokenllm_kv_tokens_cached", "gauge", "Token slots held by the prefix cache alone."),
    Metric("tokenllm_kv_tokens_active", "gauge", "Distinct token slots held by running requests."),
    Metric("tokenllm_requests_running", "gauge", "Requests in the running batch."),
    Metric("tokenllm_requests_waiting", "gauge", "Requests waiting for room in the batch."),
    Metric("tokenllm_predicted_peak_tokens", "gauge", "Most token slots the running batch is expected to hold."),
    Metric("tokenllm_retry_after_seconds", "gauge", "When it is worth coming back to a full queue; 0: nobody waits."),
    Metric("tokenllm_last_step_monotonic_seconds", "gauge", "When the last step ended, by the host's monotonic clock."),
    Metric(
        "tokenllm_requests_finished_total",
        "counter",
        "Requests that got their last word, by its reason; each choice is a request.",
        label="reason",
        labels=("stop", "length", "abort", "error", "refused"),
    ),
    Metric("tokenllm_prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
    Metric("tokenllm_prompt_tokens_computed_total", "counter", "Prompt tokens the model computed, not found cached."),
    Metric(
        "tokenllm_generation_tokens_total",
        "counter",
        "Tokens chosen by the model, unseen ones after a stop string too.",
    ),
    Metric("tokenllm_preemptions_total", "counter", "Times a running request was paused to make room."),
    Metric("tokenllm_restarts_total", "counter", "Times a process or a generation was replaced."),
    Metric("tokenllm_steps_total", "counter", "Steps of the running batch."),
    Metric("tokenllm_kernel_compilations_total", "counter", "Kernels that were compiled while requests waited."),
    Metric("tokenllm_ring_corrupt_total", "counter", "Rings whose contents did not match their checksum."),
    Metric(
        "tokenllm_time_to_first_token_seconds",
        "histogram",
        "From the arrival of a request to its first token.",
        buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    ),
    Metric(
        "tokenllm_inter_token_latency_seconds",
        "histogram",
        "Between two tokens of one request.",
        buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 1.5, 5.0),
    ),
    Metric(
        "tokenllm_request_seconds",
        "histogram",
        "From the arrival of a request to its last word.",
        buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
    ),
    Metric(
        "tokenllm_step_seconds",
        "histogram",
        "From the launch of a step to its collected result.",
        buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0),
    ),
)


def _places() -> tuple[dict[tuple[str, str], int], dict[str, tuple[int, tuple[float, ...]]], int]:
    """Where values lie, by (name, label); where histograms begin: events per bucket, events above them, their sum."""
    values, histograms, end = {}, {}, 0
    for metric in METRICS:
        if metric.kind == "histogram":
            histograms[metric.name] = (end, metric.buckets)
            end += len(metric.buckets) + 2
        else:
            values.update({(metric.name, label): end + i for i, label in enumerate(metric.labels)})
            end += len(metric.labels)
    return values, histograms, end


VALUES, HISTOGRAMS, SLOTS = _places()
GAUGES = {metric.name: VALUES[metric.name, ""] for metric in METRICS if metric.kind == "gauge"}


def create_page() -> int:
    """A new page of zeros, as a file descriptor that children inherit."""
    fd = os.memfd_create("tokenllm-counters")
    os.posix_fallocate(fd, 0, 8 * SLOTS)  # a page that is missing later would be a SIGBUS
    return fd


class Page:
    """One process's numbers. Only their owner adds, sets and observes; a name not in the table is a KeyError."""

    def __init__(self, fd: int) -> None:
        self._slots = memoryview(mmap.mmap(fd, 8 * SLOTS)).cast("d")  # an item is one aligned 8-byte store or load

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        """Count on, or move a gauge."""
        self._slots[VALUES[name, label]] += value

    def set(self, name: str, value: float) -> None:
        """Set a gauge. It stays so when this process dies, until its successor sets it."""
        self._slots[GAUGES[name]] = value

    def observe(self, name: str, seconds: float, events: int = 1) -> None:
        """Count events that took as long in a histogram."""
        start, bounds = HISTOGRAMS[name]
        self._slots[start + len(bounds) + 1] += seconds * events
        self._slots[start + bisect_left(bounds, seconds)] += events

    def get(self, name: str, label: str = "") -> float:
        """The value of a gauge or a counter."""
        return self._slots[VALUES[name, label]]

    def histogram(self, name: str) -> tuple[list[float], float]:
        """The events in each bucket, in the last those above all bounds, and the sum of their seconds."""
        start, bounds = HISTOGRAMS[name]
        *events, seconds = (self._slots[i] for i in range(start, start + len(bounds) + 2))
        return events, seconds


def total(pages: Sequence[Page], name: str, label: str = "") -> float:
    """The value of a gauge or a counter for the whole server."""
    return sum(page.get(name, label) for page in pages)
