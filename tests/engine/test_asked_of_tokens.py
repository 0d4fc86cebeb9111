"""What requests ask of tokens, with the real model: a prompt's logprobs are transformers', and masks hold."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

TEXT = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 5178, 314] * 8
OTHER = np.random.default_rng(8).integers(3, 49152, 41).tolist()


@pytest.mark.parametrize("chunk", [1000, 33, 7])
def test_a_prompts_logprobs_are_transformers(
    driver: Any, oracle: torch.nn.Module, submit: Callable[..., Any], chunk: int
) -> None:
    """However its chunks fall, beside others, and also where all of the prompt has been computed before."""
    asked = [submit(TEXT, 2, prompt_logprobs=3), submit(OTHER, 1, prompt_logprobs=0), submit([7], 1, prompt_logprobs=1)]
    told = driver.run([(0, submit(TEXT, 3)), *((2, one) for one in asked), (5, asked[0])], chunk)[1:]
    assert [len(tokens) for tokens in told] == [len(TEXT) + 1, len(OTHER), 1, len(TEXT) + 1]
    for prompt, most, tokens in ((TEXT, 3, told[0]), (OTHER, 0, told[1]), (TEXT, 3, told[3])):
        with torch.inference_mode():
            logprobs = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert [token.token for token in tokens[: len(prompt) - 1]] == prompt[1:]
        for place, token in enumerate(tokens[: len(prompt) - 1]):
            assert token.logprob == pytest.approx(float(logprobs[place, prompt[place + 1]]), abs=5 * driver.tolerance)
            assert len(token.top) == most
            for id_, logprob in token.top:
                assert logprob == pytest.approx(float(logprobs[place, id_]), abs=5 * driver.tolerance)
    assert driver.memory.active == 0


class Naive:
    """Greedy decoding with transformers' logits, every rule written out."""

    def __init__(self, oracle: torch.nn.Module, prompt: list[int]) -> None:
        self._oracle, self.prompt, self.said = oracle, prompt, list[int]()

    def tokens(self, count: int, adjust: Callable[["Naive", torch.Tensor], None]) -> Iterator[tuple[int, float]]:
        """Each with how far the second best was."""
        for _ in range(count):
            with torch.inference_mode():
                logits = self._oracle(torch.tensor([self.prompt + self.said])).logits[0, -1].clone()
                adjust(self, logits)
            best = logits.topk(2)
            self.said.append(int(best.indices[0]))
            yield self.said[-1], float(best.values[0] - best.values[1])


def biased(naive: Naive, logits: torch.Tensor) -> None:
    logits[260] += 4
    logits[7042] -= 100


def allowed(naive: Naive, logits: torch.Tensor) -> None:
    kept = logits[260:300].clone()
    logits[:] = -torch.inf
    logits[260:300] = kept


def repeated(naive: Naive, logits: torch.Tensor) -> None:
    ids = list({*naive.prompt, *naive.said})
    logits[ids] = torch.where(logits[ids] > 0, logits[ids] / 1.3, logits[ids] * 1.3)


def present(naive: Naive, logits: torch.Tensor) -> None:
    for id_ in naive.said:
        logits[id_] -= 0.7
    logits[list(set(naive.said))] -= 0.5


def not_bad(naive: Naive, logits: torch.Tensor) -> None:
    text = naive.said
    logits[[word[-1] for word in BAD if tuple(text[1 - len(word) :]) == word[:-1]]] = -torch.inf


def muted(naive: Naive, logits: torch.Tensor) -> None:
    if len(naive.said) < 4:
        logits[[7042, 260, 30]] = -torch.inf


BAD = ((7042, 30), (260, 3575, 282), (30, 378))
RULES = [
    ({"logit_bias": ((260, 4.0), (7042, -100.0))}, biased),
    ({"logit_bias": tuple((id_, 0.0) for id_ in range(260, 300)), "only_biased": True}, allowed),
    ({"repetition_penalty": 1.3}, repeated),
    ({"frequency_penalty": 0.7, "presence_penalty": 0.5}, present),
    ({"bad_words": BAD}, not_bad),
    ({"muted": (7042, 260, 30), "min_tokens": 4}, muted),
]


@pytest.mark.parametrize(("fields", "adjust"), RULES, ids=lambda rule: getattr(rule, "__name__", ""))
def test_rules_of_tokens_are_what_they_say(
    driver: Any, oracle: torch.nn.Module, submit: Callable[..., Any], fields: dict[str, Any], adjust: Any
) -> None:
    naive, count = Naive(oracle, TEXT[:5]), 16
    told = driver.run([(0, submit(TEXT[:5], count, **fields)), (1, submit(OTHER, 9))])[0]
    plain = driver.run([(0, submit(TEXT[:5], count))])[0]
    assert [token.token for token in told] != [token.token for token in plain], "the rule changes something"
    for sampled, (token, margin) in zip(told, naive.tokens(count, adjust), strict=True):
        if margin < driver.margin:
            return
        assert sampled.token == token
