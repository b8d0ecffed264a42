"""Reference engine: a plain transformers encoder or decoder, mean pooling, optional normalisation.

Reads a model folder or hub id. Short enough to check by eye; the other engines are tested against it.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.semantic.engine import quiet_transformers


class TransformersEngine:
    """Mean of the last hidden states over a text's tokens, in float32.

    Args:
        model: folder or hub id.
        max_tokens: tokens read of a text; lowered to what model and tokenizer allow.
        normalize: scale vectors to unit length.
        device: torch device.
    """

    def __init__(self, model: str, max_tokens: int, normalize: bool, device: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        quiet_transformers()
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if self.tokenizer.pad_token is None:  # decoder models; padding is masked, so any token serves
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model = AutoModel.from_pretrained(model, trust_remote_code=False, dtype=torch.float32)
        self.model = self.model.to(device).eval()
        self.device, self.normalize = device, normalize
        self.dim = int(self.model.config.hidden_size)
        positions = getattr(self.model.config, "max_position_embeddings", max_tokens)
        self.max_tokens = min(max_tokens, positions, self.tokenizer.model_max_length)

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text before truncation, (n,) int64."""
        ids = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return np.array([len(row) for row in ids], dtype=np.int64)

    def embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, dim) float32 and tokens read (n,) int64."""
        import torch

        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        mask = batch["attention_mask"]
        with torch.inference_mode():
            hidden = self.model(**batch).last_hidden_state
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
            if self.normalize:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.cpu().numpy(), mask.sum(1).cpu().numpy().astype(np.int64)
