"""PRORec Stage I over graph partitions: a worker owns its users' sequences and its items' rows of E_C and E_S.

What a batch reads of other workers' items comes by the row exchange, already adapted: the owner applies the modality
adaption layer, so rows of the model's width travel and not text embeddings. Dense layers are data-parallel. Loss,
gradients and metrics are those of `FusionModel` in one process.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from genrec_dist.collaborative.backbones import Din
from genrec_dist.collaborative.fusion import FusionModel, integrate
from genrec_dist.collaborative.losses import at_least_float32, similarity
from genrec_dist.config import FusionConfig
from genrec_dist.errors import ConfigError
from genrec_dist.evaluation.collaborative import shared_counts
from genrec_dist.evaluation.metrics import count_metrics
from genrec_dist.graph.exchange import exchange, request_rows
from genrec_dist.graph.stage import Partitions
from genrec_dist.training.owned import OwnedPrefixBatches, OwnedSequences
from genrec_dist.training.samples import HistorySamples
from genrec_dist.training.tasks import alignment_batch, uniform_negatives
from genrec_dist.training.worker import Worker

ITEM_BLOCK = 2048
USER_BLOCK = 256
GROUP_USERS = 1 << 16
"""Users whose histories' rows are on a worker at once; the catalog is sent round once for each group."""
OWN_BLOCK = 1 << 16


def check_shardable(config: FusionConfig) -> None:
    """Refuse what the sharded Stage I cannot do.

    Raises:
        ConfigError: a loss at every position of a row, or the naive concatenation, which needs the whole table.
    """
    if config.mode != "joint":
        raise ConfigError(
            "this arm needs the whole table on one worker",
            where="runtime.shard_tables",
            got=f"fusion.mode {config.mode}",
            expected="fusion.mode joint",
            fix="set runtime.shard_tables=false",
        )
    if config.optim.precision == "fp16":
        raise ConfigError(
            "tables over graph partitions have no loss scale, which fp16 needs",
            where="fusion.optim.precision",
            got="fp16",
            expected="auto, fp32 or bf16 with runtime.shard_tables",
            fix="set fusion.optim.precision=bf16",
        )
    if config.time_bumps:
        raise ConfigError(
            "times are not read over graph partitions",
            where="fusion.time_bumps",
            got=config.time_bumps,
            expected="0 with runtime.shard_tables",
            fix="set one of them to its default",
        )
    if config.backbone == "sasrec" and config.loss == "full_softmax":
        raise ConfigError(
            "a loss at every position over the whole catalog is not sharded",
            where="runtime.shard_tables",
            got="fusion.backbone sasrec with fusion.loss full_softmax",
            expected="fusion.backbone din, or fusion.loss sampled_softmax",
            fix="set one of them, or runtime.shard_tables=false",
        )


class ShardedFusionModel(FusionModel):
    """`FusionModel` whose item tables are shared out by owner.

    Args:
        config: fusion section.
        semantic: E_S of the own items.
        partitions: of the user-item graph, one a worker.
        worker: this process.
        seed: of the starting values.

    Shapes:
        semantic: (own items, semantic_dim) float32.
    """

    is_sparse = False

    def __init__(
        self, config: FusionConfig, semantic: torch.Tensor, partitions: Partitions, worker: Worker, seed: int
    ) -> None:
        partition = partitions.of_worker(worker.rank, worker.world_size)
        self.item_indices = np.array(partition.items)
        super().__init__(config, semantic, seed, self.item_indices)
        self.num_items = partitions.num_items
        self.partitions, self.worker = partitions, worker
        self.num_own_users = len(partition.users)

    def sharded_rows(self) -> dict[str, np.ndarray]:
        """Parameters sharded by owner, and the item of each of their rows."""
        return {"collaborative.weight": self.item_indices}

    def own_items(self, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `FusionModel.items`, of own rows."""
        return super().items(rows)

    def items(self, indices: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of any items, from their owners. All workers have to call this together."""
        wanted = np.arange(self.num_items) if indices is None else indices.cpu().numpy()
        ids = np.asarray(self.partitions.item_ids()[wanted])
        order = np.argsort(ids)
        plan = request_rows(ids[order], self.partitions.offsets, self.worker)
        plan = replace(plan, send_rows=plan.send_rows - self.num_own_users)
        collaborative, adapted, _ = self.own_items(plan.send_rows)
        received = exchange(torch.cat([collaborative, adapted], 1), plan, self.worker)
        back = torch.from_numpy(np.argsort(order)).to(received.device)
        collaborative, adapted = received.index_select(0, back).chunk(2, 1)
        return collaborative, adapted, self.read_table(collaborative, adapted)

    @torch.no_grad()
    def own_tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Integrated, collaborative and adapted rows of the own items."""
        blocks = [
            self.own_items(torch.arange(s, min(s + OWN_BLOCK, len(self.semantic)), device=self.semantic.device))[:2]
            for s in range(0, len(self.semantic), OWN_BLOCK)
        ] or [self.own_items()[:2]]
        collaborative, adapted = (torch.cat([block[k] for block in blocks]) for k in (0, 1))
        return integrate(collaborative, adapted, self.config.integrated), collaborative, adapted


class ShardedFusionTask:
    """Model, data order and validation of the sharded Stage I.

    Args:
        config: fusion section.
        owned: sequences of the own users.
        semantic: E_S of the own items.
        partitions: of the graph.
        worker: this process.
        seed: of starting values, order and negatives.
        users: of the validation; 0: all.
    """

    def __init__(
        self,
        config: FusionConfig,
        owned: OwnedSequences,
        semantic: torch.Tensor,
        partitions: Partitions,
        worker: Worker,
        seed: int,
        users: int,
    ) -> None:
        check_shardable(config)
        torch.manual_seed(seed)
        self.config, self.seed = config, seed
        self.model = ShardedFusionModel(config, semantic, partitions, worker, seed).to(worker.device)
        optim = config.optim
        self.batches = OwnedPrefixBatches(
            owned, config.max_history, optim.batch_size, seed, optim.length_buckets, worker.device
        )
        self.order = self.batches.order
        self.valid = owned.holdouts("valid", config.max_history, users, worker.device)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        batch = self.batches.local(indices, worker)
        batch |= alignment_batch(self.batches.target_items(indices, worker), worker)
        if self.config.loss == "sampled_softmax":
            batch["negatives"] = uniform_negatives(
                self.model.num_items, self.config.num_negatives, self.seed, indices, worker.device
            )
        return batch

    def validate(self, worker: Worker) -> dict[str, float]:
        ranks = sharded_ranks(self.model, self.valid, self.config.max_history, worker)
        return count_metrics(shared_counts(ranks, 10, worker), [10])


@torch.no_grad()
def sharded_ranks(model: ShardedFusionModel, samples: HistorySamples, max_history: int, worker: Worker) -> np.ndarray:
    """Rank of each own sample's target over the whole catalog, whose rows the owners send round in blocks.

    All workers have to call this together. Equal scores are ordered by item index.

    Shapes:
        returns: (own samples,) int64, 1 = best.
    """
    device, ranks = worker.device, []
    groups = torch.tensor(-(-len(samples) // GROUP_USERS), device=device)
    if worker.world_size > 1:
        dist.all_reduce(groups, dist.ReduceOp.MAX)
    for group in range(int(groups)):
        ends = (min((group + k) * GROUP_USERS, len(samples)) for k in (0, 1))
        ranks.append(_group_ranks(model, samples, torch.arange(*ends, device=device), max_history, worker))
    return torch.cat(ranks).cpu().numpy() if ranks else np.zeros(0, np.int64)


def _group_ranks(
    model: ShardedFusionModel, samples: HistorySamples, chosen: torch.Tensor, max_history: int, worker: Worker
) -> torch.Tensor:
    """`sharded_ranks` of some samples; the rows of their items are here at once."""
    batches = [samples.gather(part, max_history) for part in chosen.split(USER_BLOCK) if len(part)]
    needed = [torch.cat([b["history"].flatten(), b["target"]]) for b in batches]
    distinct, place = torch.unique(torch.cat([chosen.new_zeros(0), *needed]), return_inverse=True)
    _, _, table = model.items(distinct)
    states, better = [], []
    for batch, found in zip(batches, place.split([len(part) for part in needed])):
        history, target = found[: batch["history"].numel()].view_as(batch["history"]), found[-len(batch["target"]) :]
        own = _scores(model, table, history, batch["mask"], table[target]).diagonal()[:, None]
        states.append((history, batch["mask"], batch["target"][:, None], own))
        better.append(torch.zeros(len(own), dtype=torch.int64, device=worker.device))
    for items, block in _table_blocks(model, worker):
        for (history, mask, target, own), count in zip(states, better):
            score = _scores(model, table, history, mask, block)
            beats = (score > own) | ((score == own) & (items < target))
            count += (beats & (items != target)).sum(1)
    return torch.cat([chosen.new_zeros(0), *better]) + 1


def _scores(model: FusionModel, table, history, mask, candidates) -> torch.Tensor:
    """Scores of histories with some candidates."""
    if isinstance(model.backbone, Din):
        return at_least_float32(model.backbone.scores(table, history, mask, candidates))
    users = model.backbone.user(table, history, mask)  # type: ignore[operator]
    return similarity(users, candidates, model.config.similarity)


def _table_blocks(model: ShardedFusionModel, worker: Worker):
    """Item indices and table rows, a block at a time, every item once, on every worker."""
    for part in range(model.partitions.num_parts):
        items = np.asarray(model.partitions[part].items)
        for start in range(0, len(items), ITEM_BLOCK):
            end = min(start + ITEM_BLOCK, len(items))
            if part == worker.rank:
                block = model.own_items(torch.arange(start, end, device=worker.device))[2].contiguous()
            else:
                block = model.collaborative.weight.new_empty(end - start, model.config.dim)
            if worker.world_size > 1:
                dist.broadcast(block, part)
            worker.alive()
            yield torch.from_numpy(items[start:end].copy()).to(worker.device), block
