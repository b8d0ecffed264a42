"""DeepSpeed ZeRO around the loop's own optimiser: stages 0 to 3, offload, gradient accumulation.

What is written and read is the canonical state of `engine`, gathered from the shards: DeepSpeed's own checkpoints are
pickles and tie a run to its world size. Parameters are float32 at every stage and products go by autocast, so 16 bytes
a parameter are shared out: 4 of parameters, 4 of gradients, 8 of moments.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.errors import ConfigError
from genrec_dist.generator.transformer import transformer_layers
from genrec_dist.training.engine import (
    MOMENTS,
    State,
    StepByParts,
    as_model,
    autocast,
    buffer_state,
    load_buffers,
    load_torch_state,
    make_optimizer,
    model_state,
    named_trained,
    precision_of,
    set_learning_rate,
    step_tensor,
    torch_state,
)
from genrec_dist.training.flat import FlatLayers
from genrec_dist.training.losses import LossScale
from genrec_dist.training.worker import Worker


class DeepSpeedEngine(StepByParts):
    """DeepSpeed ZeRO.

    Args:
        model: its own parameters may be read anywhere in its forward; those of its modules only through their calls,
            or they are named in the model's `whole_parameters`, which stage 3 keeps gathered during a pass.
        config: optimiser.
        worker: this process.
        runtime: stage, offload, DeepSpeed's sizes.
    """

    _world: ClassVar[dist.ProcessGroup | None] = None
    """Of the last engine."""

    def __init__(self, model: nn.Module, config: OptimConfig, worker: Worker, runtime: RuntimeConfig) -> None:
        if worker.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        if os.access(sys.prefix, os.W_OK):  # compiled operators belong to this environment, not to the user
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
        import deepspeed

        # Operators that this machine could compile: none, else a first run on a CPU compiles one that only inference
        # uses, for minutes.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        self.config, self.worker, self.zero_stage = config, worker, runtime.zero_stage
        backend = "nccl" if worker.device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", str(worker.device.index or 0))  # DeepSpeed insists on it
        if worker.world_size == 1 and not dist.is_initialized():  # a plain process: a group of its own
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._forget_other_worlds()
        self.settings = deepspeed_settings(config, worker, runtime)
        self.flat = FlatLayers(transformer_layers(model), resharded=self.zero_stage == 3)
        if "torch_autocast" in self.settings:
            for row in self.flat.matrices():
                row.comm_dtype = torch.bfloat16  # type: ignore[attr-defined]  # DeepSpeed's name for it
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model.parameters(), config),
            config=self.settings,
            dist_init_required=False,
        )
        self.model = self.engine.module
        self.scale = LossScale.of(precision_of(config, worker.device))
        if self.zero_stage == 3:
            named = dict(self.model.named_parameters())
            for name in getattr(self.model, "whole_parameters", ()):
                deepspeed.zero.register_external_parameter(self.model, named[name])
        if self.zero_stage:
            self._make_moments()

    def _forget_other_worlds(self) -> None:
        """DeepSpeed keeps its groups for good; where others ended the world that they belong to, they are no use."""
        from deepspeed.utils import groups

        if DeepSpeedEngine._world is not dist.group.WORLD:
            groups._release_process_group_references()
            DeepSpeedEngine._world = dist.group.WORLD

    def _make_moments(self) -> None:
        """ZeRO makes and links the Adam moments at its first step; a checkpoint may be read or written before it."""
        for p in self._shards():
            self._base.state[p] = {"step": step_tensor(torch.zeros(()), p, self._base)} | {
                moment: torch.zeros_like(p, requires_grad=False) for moment in MOMENTS
            }
        if self.zero_stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _shards(self) -> list[torch.Tensor]:
        """What the optimiser itself sees: this worker's shard of each group of parameters, flat."""
        zero = self.optimizer
        return zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups

    @property
    def _base(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def begin_part(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        with autocast(self.config, self.worker.device):
            return self.engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        if self.scale:
            if self.zero_stage:  # scales the loss, and its own norm and clipping know of it
                self.optimizer.override_loss_scale(self.scale.value)
            else:
                loss = loss * self.scale.value
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)
        gradients = [p.grad for _, p in named_trained(self.model) if p.grad is not None]
        if self.scale and not self.zero_stage and not self.scale.unscale(gradients):
            self.engine.zero_grad()
            return
        self.engine.step()
        if self.scale and self.zero_stage:
            self.scale.update(not self.optimizer.overflow)

    def whole(self) -> contextlib.AbstractContextManager:
        """See `Engine`: stage 3 gathers what is sharded."""
        if self.zero_stage < 3:
            return self.flat.shown()
        import deepspeed

        return _whole(deepspeed.zero.GatheredParameters(list(self.model.parameters())), self.model, self.flat)

    def weights(self) -> list[torch.Tensor]:
        if self.zero_stage:
            return [shard.data for shard in self._shards()]
        return [p.data for _, p in named_trained(self.model)]

    def weights_changed(self) -> None:
        """See `Engine`: parameters are gathered from the optimiser's shards, as at the end of a step."""
        if self.zero_stage == 3:
            self._spread()
        elif self.zero_stage:
            self.optimizer.update_lp_params()

    def best(self) -> State:
        return self.flat.split(self._best())

    def _best(self) -> State:
        if not self.zero_stage:
            return model_state(self.model)
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in named_trained(self.model)}
        return buffer_state(self.model) | whole

    def state(self) -> State:
        scale = self.scale.state() if self.scale else {}
        if not self.zero_stage:
            return self.flat.split(torch_state(self.model, self._base)) | scale
        from deepspeed.utils import safe_get_full_optimizer_state

        state = as_model(self._best())
        for name, p in named_trained(self.model):
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = safe_get_full_optimizer_state(p, moment).detach().cpu().clone()
        step = next(iter(self._base.state.values()))["step"]
        return self.flat.split(state) | {"step": torch.as_tensor(float(step))} | scale

    def load(self, state: State) -> None:
        if self.scale:
            self.scale.load(state)
        state = self.flat.join(state)
        if not self.zero_stage:
            load_torch_state(self.model, self._base, state)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        load_buffers(self.model, state)
        for name, p in named_trained(self.model):
            value = state[f"model/{name}"].to(self.worker.device)
            if self.zero_stage < 3:
                with torch.no_grad():
                    p.copy_(value)
            safe_set_full_fp32_param(p, value)
            for moment in MOMENTS if "step" in state else ():
                safe_set_full_optimizer_state(p, state[f"{moment}/{name}"].to(self.worker.device), moment)
        if self.zero_stage == 3:
            self._spread()
        for shard, slot in self._base.state.items():
            if "step" in slot and "step" in state:
                slot["step"] = step_tensor(state["step"], shard, self._base)

    def _spread(self) -> None:
        """Bring the optimiser's shards to the parameters, as DeepSpeed does at the end of a step."""
        zero = self.optimizer
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@contextlib.contextmanager
def _whole(gathered: contextlib.AbstractContextManager, model: nn.Module, flat: FlatLayers) -> Iterator[None]:
    """Gathered parameters, and DeepSpeed's hooks of the modules out of the way: they would shard them again."""
    with gathered, flat.shown():
        hooks = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = type(before)(), type(after)()
        try:
            yield
        finally:
            for module, before, after in hooks:
                module._forward_pre_hooks, module._forward_hooks = before, after


def deepspeed_settings(config: OptimConfig, worker: Worker, runtime: RuntimeConfig) -> dict[str, Any]:
    """DeepSpeed's own JSON for this optimiser, world size, stage and offload."""
    sizes, stage = runtime.deepspeed, runtime.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        on_gpu = worker.device.type == "cuda"
        zero |= {
            "overlap_comm": sizes.overlap_comm and on_gpu,
            "contiguous_gradients": sizes.contiguous_gradients,
            "reduce_bucket_size": sizes.reduce_bucket_size,
            "allgather_bucket_size": sizes.allgather_bucket_size,
        }
        if runtime.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": sizes.prefetch_bucket_size,
            "stage3_param_persistence_threshold": sizes.persistence_threshold,
            "stage3_max_live_parameters": sizes.max_live_parameters,
            "memory_efficient_linear": False,  # would put a slow function in the place of torch's, for all modules
        }
        if runtime.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": worker.device.type == "cuda"}
    parts = max(runtime.micro_batches // worker.world_size, 1)
    gathers = {}
    if stage == 3 and sizes.gather_dtype == "bf16":
        if precision_of(config, worker.device) != torch.bfloat16:
            raise ConfigError(
                "weights would be rounded that products do not round",
                where="runtime.deepspeed.gather_dtype",
                got=f"bf16, with precision {config.precision} on {worker.device.type}",
                expected="fp32, or products in bf16",
                fix="set gather_dtype to fp32, or optim.precision to bf16",
            )
        gathers = {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    return gathers | {
        # Only for DeepSpeed's own bookkeeping: the loop cuts the batches, and the last of an epoch is smaller. It sets
        # the boundaries of accumulation as well.
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // (worker.world_size * parts)),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": sizes.communication_dtype,
        "steps_per_print": 1_000_000_000,
    }
