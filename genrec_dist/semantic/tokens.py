"""Text -> token ids, once: lengths are counted, long texts are cut, and engines get ids."""

from __future__ import annotations

from typing import Any

import numpy as np

CHARS_PER_TOKEN = 64
"""A text is cut to this many characters a token before the tokenizer sees it: a megabyte costs no megabyte."""


class TextTokenizer:
    """A transformers tokenizer, special tokens as its model wants them.

    Args:
        tokenizer: a fast or slow transformers tokenizer.
        max_tokens: tokens that are kept, special tokens included; lowered to what the tokenizer allows.
        prefix: put before every text (prompt of the model).
        lower: make every text lower case (where the model's settings, not its tokenizer, say so).
    """

    def __init__(self, tokenizer: Any, max_tokens: int, prefix: str = "", lower: bool = False) -> None:
        self.tokenizer, self.prefix, self.lower = tokenizer, prefix, lower
        self.max_tokens = min(max_tokens, tokenizer.model_max_length)

    def __call__(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        """Token ids of each text.

        Shapes:
            returns: n lists of at most `max_tokens` ids; (n,) bool, True where a text was cut.
        """
        texts = [self.prefix + (text.lower() if self.lower else text) for text in texts]
        limit = CHARS_PER_TOKEN * self.max_tokens
        clipped = [text[:limit] for text in texts]
        ids = self._encode(clipped)
        long = [n for n, row in enumerate(ids) if len(row) > self.max_tokens]
        if long:  # again, so that the special tokens at the end stay
            for n, row in zip(long, self._encode([clipped[n] for n in long], truncation=True)):
                ids[n] = row
        cut = np.array([len(text) > limit for text in texts], bool)
        cut[long] = True
        return ids, cut

    def _encode(self, texts: list[str], truncation: bool = False) -> list[list[int]]:
        return self.tokenizer(
            texts,
            truncation=truncation,
            max_length=self.max_tokens if truncation else None,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def padded(ids: list[list[int]], pad: int, device: str) -> tuple[Any, Any]:
    """Right-padded batch for a torch model.

    Shapes:
        returns: input ids (n, longest) int64, attention mask (n, longest) int64.
    """
    import torch

    longest = max(len(row) for row in ids)
    tokens = np.full((len(ids), longest), pad, np.int64)
    mask = np.zeros((len(ids), longest), np.int64)
    for n, row in enumerate(ids):
        tokens[n, : len(row)] = row
        mask[n, : len(row)] = 1
    return torch.from_numpy(tokens).to(device, non_blocking=True), torch.from_numpy(mask).to(device, non_blocking=True)
