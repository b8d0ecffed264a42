"""Sections of where and how fast the work is done; never part of a content hash."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genrec_dist.config.section import Section


class VllmConfig(Section):
    """How vLLM engines run."""

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one engine, on one node")
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1)
    max_batched_tokens: int = Field(0, ge=0, description="tokens of a step; 0: 16384 on a GPU, 4096 on a CPU")
    enforce_eager: bool = Field(True, description="False compiles the model and captures CUDA graphs at the start")
    kv_cache_mib: int = Field(0, ge=0, description="key-value cache on a CPU; 0: two full steps")


class DeepspeedConfig(Section):
    """What DeepSpeed's ZeRO may be told beyond its stage; sizes in numbers, not bytes."""

    overlap_comm: bool = Field(True, description="reduce gradients while the backward pass goes on")
    contiguous_gradients: bool = Field(True, description="copy gradients into one buffer as they are made")
    reduce_bucket_size: int = Field(50_000_000, ge=1, description="gradients that are reduced at once")
    allgather_bucket_size: int = Field(50_000_000, ge=1, description="parameters gathered at once (stage 1, 2)")
    prefetch_bucket_size: int = Field(50_000_000, ge=0, description="parameters fetched ahead (stage 3)")
    persistence_threshold: int = Field(100_000, ge=0, description="smaller parameters stay whole (stage 3)")
    max_live_parameters: int = Field(1_000_000_000, ge=0, description="gathered parameters kept at most (stage 3)")
    communication_dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of reduced gradients")
    gather_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of layers' weights of products as workers exchange them, and of their gradients (stage 3); bf16: "
        "half the traffic, for optim.precision bf16, whose products round them anyway",
    )


class RuntimeConfig(Section):
    """Where and how fast; never part of a content hash."""

    backend: Literal["ray", "local"] = Field("ray", description="local: one plain process, no Ray")
    ray_address: str | None = Field(None, description="None starts a private Ray on this machine")
    num_workers: int = Field(1, ge=1, description="training and evaluation workers")
    min_workers: int = Field(
        0,
        ge=0,
        description="fewest training workers under Ray, for clusters that grow and shrink; 0: always num_workers",
    )
    num_embed_workers: int = Field(1, ge=1, description="engines, each on its own cores or GPUs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(
        0, ge=0, description="CPU threads a worker; 0: cores over workers. Training on a GPU takes 4 at most"
    )
    engine: Literal["auto", "torch", "deepspeed"] = Field(
        "auto", description="auto: deepspeed under Ray, torch in a plain process"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="deepspeed: 1 shards the optimiser's moments, 2 gradients too, 3 parameters too"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keep moments (zero_stage 1 to 3), or parameters as well (3), in the CPU's memory"
    )
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    micro_batches: int = Field(
        0,
        ge=0,
        description="parts of a global batch over all workers, a multiple of num_workers: each worker adds up the "
        "gradients of its parts; dropout goes by part, so it is the same for any number of workers. 0: one a worker",
    )
    activation_checkpointing: bool = Field(
        False, description="keep the inputs of Transformer layers only and compute the rest again in the backward pass"
    )
    step_mode: Literal["auto", "eager", "graph", "compile"] = Field(
        "auto",
        description="of training on a GPU by the torch engine; graph: CUDA graphs of whole steps; compile: fused by "
        "torch.compile, then graphs; auto: graph",
    )
    checkpoint_minutes: float = Field(
        1.0, ge=0, description="minutes between checkpoints; 0: after every epoch, and by checkpoint_steps"
    )
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: the clock or epochs decide")
    keep_checkpoints: int = Field(2, ge=1)
    spmm: Literal["auto", "dgl", "torch", "triton"] = Field(
        "auto", description="sums over neighbours; auto: triton on a GPU, dgl on a CPU where it works, else torch"
    )
    overlap_halo: bool = Field(False, description="sum over owned neighbours while halo rows are on their way")
    partition_minutes: float = Field(60.0, gt=0, description="time limit of the graph partitioner")
    shard_tables: bool = Field(
        False,
        description="Stage I with user sequences and item tables sharded over graph partitions; with fusion.loss "
        "full_softmax every worker still gets the whole table with each batch",
    )
    resident_gib: float = Field(
        4.0, ge=0, description="embedding rows that a k-means worker keeps in memory; more are read again in each pass"
    )
    task_mib: float = Field(
        256.0,
        ge=0,
        description="embedding rows of a k-means subtree that one task takes; larger nodes go to all workers",
    )
    embed_executor: Literal["actors", "ray_data_llm"] = Field(
        "actors", description="actors: an engine in each Ray Data actor; ray_data_llm: Ray's own vLLM processor"
    )
    embed_batch_size: int = Field(0, ge=0, description="most texts of a forward pass; 0: the engine's choice")
    embed_batch_tokens: int = Field(0, ge=0, description="most padded tokens of a forward pass; 0: likewise")
    reuse_embeddings: bool = Field(
        True, description="take the vectors of texts that an earlier artifact of the same model and settings holds"
    )
    vllm: VllmConfig = VllmConfig()
    eval_batch_size: int = Field(256, ge=1)
    max_failures: int = Field(1, ge=0, description="retries after real failures")
    max_preemptions: int = Field(10, ge=0, description="retries after node loss")
    hang_seconds: float = Field(
        600.0, ge=0, description="a worker that is silent for so long after its first step is ended; 0: never"
    )
    grace_seconds: float = Field(25.0, ge=0, description="time to save a checkpoint after SIGTERM")
    progress_seconds: float = Field(15.0, gt=0, description="between plain progress lines")
    mirror_seconds: float = Field(
        60.0, gt=0, description="between copies of the run folder and of unfinished builds to an S3 store"
    )

    @model_validator(mode="after")
    def _parts(self) -> RuntimeConfig:
        if self.micro_batches % self.num_workers:
            raise ValueError(
                f"runtime.micro_batches {self.micro_batches} must be a multiple of num_workers {self.num_workers}"
            )
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"runtime.offload '{self.offload}' needs runtime.zero_stage {least} or more")
        return self
