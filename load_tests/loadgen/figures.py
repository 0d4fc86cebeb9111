"""From the outcomes of one run to its figures."""

import os
from collections import Counter

import msgspec
import numpy as np

from loadgen.client import Answered, Failed, Outcome, Pace


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float


class Figures(msgspec.Struct, frozen=True):
    """What one run measured. Failed requests give no tokens and no times, but they are counted."""

    requests: int
    failed: int
    ended_early: int  # answered with fewer tokens than asked for
    wall_s: float  # from the first request sent to the last one ended
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: Percentiles | None
    inter_token_s: Percentiles | None
    request_s: Percentiles | None
    errors: dict[str, int]
    usage_reported: bool
    load_average: float  # of the machine that runs the client, over the last minute


class Run(msgspec.Struct, frozen=True):
    """One run as it is saved."""

    label: str
    pace: Pace
    figures: Figures
    outcomes: list[Outcome]


def percentiles(samples: list[float]) -> Percentiles | None:
    return Percentiles(*np.percentile(samples, [50, 90, 99]).tolist()) if samples else None


def summarise(outcomes: list[Outcome]) -> Figures:
    answered = [outcome for outcome in outcomes if isinstance(outcome, Answered)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    wall_s = max(o.started_s + o.total_s for o in outcomes) - min(o.started_s for o in outcomes)
    prompt_tokens = sum(answer.prompt_tokens for answer in answered)
    output_tokens = sum(answer.output_tokens for answer in answered)
    return Figures(
        requests=len(outcomes),
        failed=len(failed),
        ended_early=sum(answer.output_tokens < answer.asked_tokens for answer in answered),
        wall_s=wall_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_tokens_per_s=prompt_tokens / wall_s,
        output_tokens_per_s=output_tokens / wall_s,
        ttft_s=percentiles([answer.ttft_s for answer in answered]),
        inter_token_s=percentiles([gap for answer in answered for gap in answer.inter_token_s]),
        request_s=percentiles([answer.total_s for answer in answered]),
        errors=dict(Counter(failure.error for failure in failed)),
        usage_reported=all(answer.usage_reported for answer in answered),
        load_average=os.getloadavg()[0],
    )
