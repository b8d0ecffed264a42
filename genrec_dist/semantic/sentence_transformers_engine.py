"""Engine on the sentence-transformers library: pooling and projection as the model's own modules say.

Reads a model folder or hub id. A normalising module is taken out: normalising is the stage's setting.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.semantic.encoders import ModelSource
from genrec_dist.semantic.engine import quiet_transformers
from genrec_dist.semantic.tokens import TextTokenizer, padded
from genrec_dist.semantic.transformers_engine import torch_batch, torch_survives

POOLING_MODES = {"mean": "mean", "last": "lasttoken", "cls": "cls"}


class SentenceTransformersEngine:
    """One SentenceTransformer.

    Args:
        source: model; its pooling replaces that of the model's modules, unless it is 'model'.
        max_tokens: tokens read of a text; lowered to what the tokenizer says the model can take. It replaces
            the (often smaller) default of the model's own settings.
        dtype: 'float32', 'float16' or 'bfloat16'.
        device: torch device.
    """

    def __init__(self, source: ModelSource, max_tokens: int, dtype: str, device: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        quiet_transformers()
        self.model = SentenceTransformer(
            source.path,
            revision=source.revision,
            device=device,
            trust_remote_code=False,
            model_kwargs={"dtype": getattr(torch, dtype)},
        ).eval()
        for index in reversed(range(len(self.model))):
            if isinstance(self.model[index], Normalize):
                del self.model[index]
        if source.pooling != "model":
            for module in self.model:
                if isinstance(module, Pooling):
                    module.pooling_mode = POOLING_MODES[source.pooling]
        dim = self.model.get_embedding_dimension()
        if dim is None:
            raise ValueError("the model does not say how wide its embeddings are")
        self.dim, self.device = dim, device
        prompt = self.model.prompts.get(self.model.default_prompt_name or "", "") or ""
        tokenizer = self.model.tokenizer
        self.tokenizer = TextTokenizer(tokenizer, max_tokens, prompt, getattr(self.model[0], "do_lower_case", False))
        self.model.max_seq_length = self.tokenizer.max_tokens
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.batch_rows, self.batch_tokens = torch_batch(device)

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Vectors (n, dim) float32."""
        import torch

        tokens, mask = padded(ids, self.pad, self.device)
        with torch.inference_mode():
            vectors = self.model({"input_ids": tokens, "attention_mask": mask})["sentence_embedding"]
        return vectors.float().cpu().numpy()

    def survives(self, error: Exception) -> bool:
        return torch_survives(error)
