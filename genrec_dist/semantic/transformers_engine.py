"""Reference engine: a plain transformers encoder or decoder. Short enough to check by eye; the others are tested
against it. Reads a model folder or hub id.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.errors import ConfigError
from genrec_dist.semantic.encoders import ModelSource, Pooling
from genrec_dist.semantic.engine import quiet_transformers
from genrec_dist.semantic.tokens import TextTokenizer, padded


class TransformersEngine:
    """Pooled last hidden states.

    Args:
        source: model and pooling: the mean over a text's tokens, its last token, or its first ('cls').
        max_tokens: tokens read of a text; lowered to what model and tokenizer allow.
        dtype: 'float32', 'float16' or 'bfloat16' of the model; pooling is in float32.
        device: torch device.
    """

    def __init__(self, source: ModelSource, max_tokens: int, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        quiet_transformers()
        if source.pooling == "model":
            raise ConfigError(
                "a plain model has no pooling of its own",
                where="semantic.pooling",
                got="that of the model",
                expected="mean, last or cls",
                fix="set it, or use semantic.engine=sentence_transformers",
            )
        options = {"revision": source.revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
        model = AutoModel.from_pretrained(source.path, dtype=getattr(torch, dtype), **options)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model = model.to(device).eval()
        self.pooling, self.device, self.dim = source.pooling, device, int(model.config.hidden_size)
        positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self.tokenizer = TextTokenizer(tokenizer, min(max_tokens, positions))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked: any token serves
        self.batch_rows, self.batch_tokens = torch_batch(device)

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Vectors (n, dim) float32."""
        import torch

        tokens, mask = padded(ids, self.pad, self.device)
        with torch.inference_mode():
            hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
            vectors = pool(hidden, mask, self.pooling)
        return vectors.float().cpu().numpy()

    def survives(self, error: Exception) -> bool:
        return torch_survives(error)


def pool(hidden, mask, pooling: Pooling):
    """One vector a text.

    Shapes:
        hidden: (n, length, dim) float, right-padded. mask: (n, length) int64. returns: (n, dim) float32.
    """
    import torch

    if pooling == "cls":
        return hidden[:, 0].float()
    lengths = mask.sum(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    kept = hidden.masked_fill(~mask.bool().unsqueeze(-1), 0)
    return kept.sum(1, dtype=torch.float32) / lengths.unsqueeze(-1)


def torch_batch(device: str) -> tuple[int, int]:
    """Texts and padded tokens of a batch: a CPU likes small ones, a GPU must be filled."""
    return (32, 4096) if device == "cpu" else (1024, 32768)


def torch_survives(error: Exception) -> bool:
    """False for errors after which the CUDA context of the process is lost."""
    import torch

    lost = getattr(torch, "AcceleratorError", ())
    return not isinstance(error, lost) and "CUDA error" not in str(error)
