"""Embedding through `ray.data.llm`: Ray's own vLLM processor in the place of our actors.

Tasks read and tokenise shards, Ray's engine stage embeds texts in whatever order, and this process gathers the vectors
and is the one owner of every shard. So all vectors travel to it; the default executor has no such bottleneck.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np

from genrec_dist.cluster import quiet_ray_data
from genrec_dist.semantic.encoders import ModelSource, resolve_model
from genrec_dist.semantic.tokens import TextTokenizer
from genrec_dist.semantic.vllm_engine import CALL_TEXTS, engine_arguments, environment, load_config, load_tokenizer
from genrec_dist.semantic.worker import EmbedJob, Prepared, ShardEmbedder


@dataclasses.dataclass
class RemoteEngine:
    """What preparing a shard needs of an engine that lives elsewhere."""

    dim: int
    tokenizer: TextTokenizer
    batch_rows: int = CALL_TEXTS
    batch_tokens: int = 0

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        raise AssertionError("the engine is in Ray's processor")

    def survives(self, error: Exception) -> bool:
        return True


def run_ray_llm(job: EmbedJob, pending: list[int], workers: int, cores: int, gpus: float) -> list[dict]:
    """Embed the pending shards in one run of Ray's processor.

    Args:
        job: what to embed.
        pending: shard numbers.
        workers: engines.
        cores: CPU cores of an engine.
        gpus: GPUs of an engine, 0 for the CPU.

    Returns:
        One row a shard, as `ShardEmbedder.embed_shards` gives them.
    """
    from ray.data import from_items
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    quiet_ray_data()
    gatherer = Gatherer(job)
    device = "cuda" if gpus else "cpu"
    source = resolve_model(job.settings)
    arguments = engine_arguments(source, load_config(source), gatherer.tokenizer, job.settings.dtype, device, job.vllm)
    model = arguments.pop("model")
    group = job.vllm.tensor_parallel_size
    config = vLLMEngineProcessorConfig(
        model_source=model,
        task_type="embed",
        engine_kwargs=arguments,
        batch_size=256,
        concurrency=workers,
        should_continue_on_error=True,
        log_engine_metrics=False,
        runtime_env={"env_vars": environment(device, job.num_threads)},
        # Without it the processor asks for a GPU and waits for ever where there is none.
        placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": gpus / group} if gpus else {"CPU": cores}},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(config, preprocess=_request, postprocess=_vector)
    shards = from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
    rows = shards.flat_map(partial(token_rows, job=dataclasses.replace(job, num_threads=1)), num_cpus=0)
    for row in processor(rows).iter_rows():
        gatherer.add(row)
    gatherer.finish(pending)
    return gatherer.done


def token_rows(row: dict, job: EmbedJob) -> Iterator[dict]:
    """The texts of one shard as token ids."""
    prepared = _embedder(job).prepare(int(row["shard"]))
    for text in prepared.todo.tolist():
        yield {"shard": prepared.shard, "row": text, "ids": prepared.ids[text]}


def _request(row: dict) -> dict:
    return {"shard": row["shard"], "row": row["row"], "prompt": "", "tokenized_prompt": row["ids"]}


def _vector(row: dict) -> dict:
    error = row.get("__inference_error__") or ""
    found = row.get("embeddings")
    vector = np.empty(0, np.float32) if error or found is None else np.asarray(found, np.float32)
    return {"shard": row["shard"], "row": row["row"], "vector": vector, "error": str(error)}


def _embedder(job: EmbedJob) -> ShardEmbedder:
    """A worker that can prepare and write shards, and has no engine."""
    return ShardEmbedder(job, _remote_engine(resolve_model(job.settings), job.settings.max_tokens))


@lru_cache(maxsize=1)  # a task is a shard; its process serves many
def _remote_engine(source: ModelSource, max_tokens: int) -> RemoteEngine:
    config = load_config(source)
    return RemoteEngine(int(config.hidden_size), load_tokenizer(source, config, max_tokens))


class Gatherer:
    """Puts vectors that arrive in any order into their shards, and writes a shard when it is whole.

    Args:
        job: what is embedded.
    """

    def __init__(self, job: EmbedJob) -> None:
        self.embedder = _embedder(job)
        self.tokenizer = self.embedder.tokenizer
        self.open: dict[int, tuple[Prepared, set[int]]] = {}
        self.began = time.time()  # the start of the engines is in it: Ray does not say when they are ready
        self.done: list[dict] = []
        self.written: set[int] = set()

    def add(self, row: dict[str, Any]) -> None:
        """Take one vector, or the error in its place."""
        shard, text = int(row["shard"]), int(row["row"])
        if shard in self.written:  # a task that Ray ran twice
            return
        if shard not in self.open:
            prepared = self.embedder.prepare(shard)
            self.open[shard] = prepared, set(prepared.todo.tolist())
        prepared, missing = self.open[shard]
        if text not in missing:
            return
        missing.remove(text)
        if row["error"]:
            self.embedder.fail(prepared, text, "embedding_error", row["error"][:200])
        else:
            self.embedder.keep([text], np.asarray(row["vector"], np.float32)[None], prepared)
        if not missing:
            self._close(shard)

    def finish(self, pending: list[int]) -> None:
        """Write the shards of which no text had to be embedded."""
        for shard in pending:
            if shard not in self.written and shard not in self.open:
                prepared = self.embedder.prepare(shard)
                if not len(prepared.todo):
                    self.open[shard] = prepared, set()
                    self._close(shard)

    def _close(self, shard: int) -> None:
        prepared, _ = self.open.pop(shard)
        self.embedder.write(prepared)
        self.written.add(shard)
        tokens = prepared.info["tokens"]
        row = {"items": len(prepared.vectors), "tokens": tokens, "started": self.began, "ended": time.time()}
        self.done.append({"shard": shard, **row})
