"""How likely a model finds given answers: log p of texts after prompts, without sampling anything.

A text is tokenized as training tokenizes an answer (VLMProcessor.render): as one piece behind the prompt, so that no
token spans both. Its end token counts only where it is asked for, as others' harnesses count the text alone: without it
"red" is never less likely than "red panda". Sums favour short answers; `Likelihood.mean` is the sum per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.inference.answerer import Answerer, PromptTooLong
from model.inference.reader import Prompt, RowCache
from model.inference.rows import check_numbers
from model.messages import UserError


@dataclass(frozen=True)
class Likelihood:
    total: float  # sum of log p over the tokens, natural logarithm
    tokens: int
    greedy: bool  # whether every token is the likeliest one: at temperature 0 the model would say just this

    @property
    def mean(self) -> float:
        """log p per token."""
        return self.total / self.tokens


@torch.inference_mode()
def log_likelihoods(
    answerer: Answerer, prompts: Sequence[Prompt], texts: Sequence[str], with_end: bool = False
) -> list[Likelihood]:
    """How likely each text is as the answer to its prompt, all as one batch.

    A prompt that several texts belong to is read once. with_end: the token that ends an answer counts, too.

    Raises:
        PromptTooLong: prompt and text together are more than the model reads.
        UserError: a text has no token, or the model computes what is no number.
    """
    if not prompts:
        return []
    continuations = [_tokens(answerer, text, with_end) for text in texts]
    for prompt, tokens in zip(prompts, continuations, strict=True):
        if (length := len(prompt.ids) + len(tokens)) > answerer.max_length:
            raise PromptTooLong(
                f"the conversation and the text that is scored take {length} tokens and the model reads "
                f"{answerer.max_length}: ask less at once, or score less"
            )
    logits, cache = _read_once(answerer, prompts)
    totals, greedy = [0.0] * len(prompts), [True] * len(prompts)
    rows = list(range(len(prompts)))  # that still have tokens to score
    for place in range(max(map(len, continuations))):
        check_numbers(logits, answerer.dtype)
        tokens = torch.tensor([continuations[row][place] for row in rows], device=logits.device)
        likely = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # [rows]
        for row, value, is_best in zip(rows, likely.tolist(), (logits.argmax(-1) == tokens).tolist(), strict=True):
            totals[row] += value
            greedy[row] &= is_best
        going = [number for number, row in enumerate(rows) if place + 1 < len(continuations[row])]
        if not going:
            break
        if len(going) < len(rows):
            cache.keep(going)
            rows, tokens = [rows[number] for number in going], tokens[going]
        logits = answerer.reader.step(tokens, cache)
    return [
        Likelihood(total, len(tokens), best) for total, tokens, best in zip(totals, continuations, greedy, strict=True)
    ]


def _tokens(answerer: Answerer, text: str, with_end: bool) -> tuple[int, ...]:
    processor = answerer.processor
    tokens = (*processor.encode(text), *(processor.end.ids if with_end else ()))
    if not tokens:
        raise UserError("a text to score is empty: give it at least a letter, or count its end token")
    return tokens


def _read_once(answerer: Answerer, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, RowCache]:
    """Logits [prompts, vocabulary] and a cache with a row for each prompt, of which equal ones were read once."""
    different: dict[tuple, Prompt] = {}
    keys = [(tuple(prompt.ids), tuple(prompt.digests)) for prompt in prompts]
    for key, prompt in zip(keys, prompts, strict=True):
        different.setdefault(key, prompt)
    logits, cache = answerer.reader.start(list(different.values()))
    numbers = {key: number for number, key in enumerate(different)}
    rows = [numbers[key] for key in keys]
    cache.keep(rows)
    return logits[rows], cache
