"""The most memory a batch of requests will hold together, if it is known how long each will live."""

import numpy as np

from tokenllm.routing.columns import Floats, Ints


def peak(tokens: Ints | Floats, steps: Ints | Floats) -> float:
    """max over k of  steps(k)·k + Σ_{i≤k} tokens(i),  requests sorted by the steps they still live, longest first.

    Memory can only peak just before somebody leaves: when the k-th longest-lived does, exactly k are alive, and each
    has grown by steps(k).
    """
    if not tokens.shape[-1]:
        return 0.0
    return float(peaks(tokens, steps).max())


def peaks(tokens: Ints | Floats, steps: Ints | Floats) -> Ints | Floats:
    """The same for each row of tokens and steps, [..., requests]: several guesses are judged at once."""
    order = np.argsort(-steps, axis=-1, kind="stable")
    alive = np.arange(1, tokens.shape[-1] + 1)
    falling = np.take_along_axis(steps, order, -1)
    return (np.take_along_axis(tokens, order, -1).cumsum(-1) + falling * alive).max(-1)
