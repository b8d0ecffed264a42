"""Engine on the sentence-transformers library: pooling and projection as the model's own modules say.

Reads a model folder or hub id.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.semantic.engine import quiet_transformers


class SentenceTransformersEngine:
    """One SentenceTransformer in float32.

    Args:
        model: folder or hub id.
        max_tokens: tokens read of a text; lowered to what the tokenizer says the model can take. It replaces
            the (often smaller) default of the model's own settings.
        normalize: scale vectors to unit length; False also takes out a normalising module of the model.
        device: torch device.
    """

    def __init__(self, model: str, max_tokens: int, normalize: bool, device: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize

        quiet_transformers()
        self.model = SentenceTransformer(
            model, device=device, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
        ).eval()
        if not normalize:
            for index in reversed(range(len(self.model))):
                if isinstance(self.model[index], Normalize):
                    del self.model[index]
        self.normalize = normalize
        self.max_tokens = min(max_tokens, self.model.tokenizer.model_max_length)
        self.model.max_seq_length = self.max_tokens
        dim = self.model.get_embedding_dimension()
        if dim is None:
            raise ValueError("the model does not say how wide its embeddings are")
        self.dim = dim

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text before truncation, (n,) int64."""
        ids = self.model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return np.array([len(row) for row in ids], dtype=np.int64)

    def embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, dim) float32 and tokens read (n,) int64."""
        vectors = self.model.encode(
            texts,
            batch_size=len(texts),
            normalize_embeddings=self.normalize,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return vectors.astype(np.float32, copy=False), np.minimum(self.count_tokens(texts), self.max_tokens)
