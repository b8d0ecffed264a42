"""Tiny text encoders with random weights, written as model folders that every engine loads. One token a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_POSITIONS = 128


def write_tiny_encoder(folder: Path, kind: str = "llama", *, seed: int = 0, dim: int = 64) -> Path:
    """Write a model folder: configuration, float32 safetensors weights, tokenizer.

    Args:
        folder: made when missing.
        kind: 'llama' (decoder; BOS in front, no padding token, as Llama2 has it), 'bert' ([CLS] and [SEP]) or 't5'
            (encoder-decoder; </s> at the end).
        seed: of the weights.
        dim: width, a multiple of 32 (vLLM wants heads of 32 at least).
    """
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    tokenizer = byte_tokenizer(kind)
    torch.manual_seed(seed)
    vocab, heads = len(tokenizer), dim // 32
    common: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": None if kind == "llama" else tokenizer.pad_token_id}
    model: Any
    if kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(d_model=dim, d_kv=32, d_ff=2 * dim, num_layers=2, num_heads=heads, **common)
        )
    else:
        common |= {
            "hidden_size": dim,
            "intermediate_size": 2 * dim,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "max_position_embeddings": MAX_POSITIONS,
        }
        model = LlamaForCausalLM(LlamaConfig(**common)) if kind == "llama" else BertModel(BertConfig(**common))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def byte_tokenizer(kind: str):
    """A fast tokenizer with one token a byte and the special tokens of the model's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {
        "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "bert": {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    }[kind]
    names = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {name: n for n, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    around = {"llama": "<s> $A", "bert": "[CLS] $A [SEP]", "t5": "$A </s>"}[kind]
    used = [(name, vocab[name]) for name in around.split() if name in vocab]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **special)
