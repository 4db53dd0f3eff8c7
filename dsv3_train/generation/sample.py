"""Continuing a text with a trained model, token by token, over a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel


class Decoder:
    """A model with the keys and values of what it has read so far."""

    def __init__(self, model: torch.nn.Module, max_tokens: int) -> None:
        """`model`: a whole GPTModel in evaluation mode (or its BF16 wrapper); `max_tokens`: room in the cache."""
        self.model = model
        self._context = StaticInferenceContext(max_batch_size=1, max_sequence_length=max_tokens)

    @torch.no_grad()
    def read(self, tokens_1s: torch.Tensor) -> torch.Tensor:
        """Append [1, s] tokens; returns FP32 logits [vocabulary] for the token after them."""
        start = self._context.sequence_len_offset
        positions = torch.arange(start, start + tokens_1s.size(1), device=tokens_1s.device)[None]
        logits_1sv = self.model(tokens_1s, positions, None, inference_context=self._context, runtime_gather_output=True)
        self._context.increment_sequence_len_offset(tokens_1s.size(1))
        return logits_1sv[0, -1].float()


_COLDEST = 1e-4
"""Temperatures below it are 0: logits would be divided beyond FP32."""


def choose(logits_v: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, else drawn from the smallest set of mass `top_p`."""
    if temperature < _COLDEST:
        return int(logits_v.argmax())
    probs, order = torch.softmax(logits_v / temperature, dim=-1).sort(descending=True)
    probs[probs.cumsum(0) - probs >= top_p] = 0  # the token that crosses top_p stays
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def continuation(
    model: GPTModel | torch.nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    stops: Collection[int],
    device: str,
) -> Iterator[int]:
    """Token ids after `prompt`, until one of `stops` (not yielded) or `max_new_tokens`.

    With experts spread over several ranks every rank runs this; rank 0 draws for all.
    """
    decoder = Decoder(model, len(prompt) + max_new_tokens)
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        token = torch.tensor([[choose(decoder.read(tokens), temperature, top_p, generator)]], device=device)
        torch.distributed.broadcast(token, 0)
        if int(token) in stops:
            return
        yield int(token)
        tokens = token
