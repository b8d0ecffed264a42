"""Training of the RQ-VAE on workers, and the codes of all items from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.embeddings import EmbeddingWriter, shard_rows
from genrec_dist.artifacts.files import write_json
from genrec_dist.config import IdentifierConfig
from genrec_dist.identifiers.collisions import uniqueness
from genrec_dist.identifiers.quantizer import Quantized
from genrec_dist.identifiers.rqvae import RqVae
from genrec_dist.identifiers.tables import Tables
from genrec_dist.pipeline import StageContext
from genrec_dist.training.engine import TorchEngine
from genrec_dist.training.loop import train
from genrec_dist.training.order import BatchOrder, permute
from genrec_dist.training.schedule import local_part
from genrec_dist.training.worker import Worker, exact_products

MONITOR = "explained"
BLOCK_ROWS = 1 << 14
VALIDATION_ITEMS = 1 << 17
LATENT = "latent"
CODES = "codes.npy"


class RqvaeTask:
    """Model, data order and validation of the tokenizer.

    Validation is on the items themselves (at most VALIDATION_ITEMS of them): there is nothing to generalise to.

    Args:
        config: identifiers section.
        tables: inputs.
        worker: this process.
        seed: of starting values, order and revived codes.
    """

    def __init__(self, config: IdentifierConfig, tables: Tables, worker: Worker, seed: int) -> None:
        self.config, self.tables, self.worker, self.seed = config, tables, worker, seed
        rqvae = config.rqvae
        scales = tables.scales()
        torch.manual_seed(seed)
        self.model = RqVae(rqvae, config.num_levels, config.num_clusters, tables.widths, scales).to(worker.device)
        self.model.quantizer.total = worker.sum
        self.order = BatchOrder(tables.num_items, rqvae.optim.batch_size, seed)
        if rqvae.kmeans_start:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Worker 0 clusters what the untrained encoder makes of a sample; the others get its codes."""
        quantizer = self.model.quantizer
        if self.worker.is_main:
            count = min(self.config.rqvae.kmeans_items, self.tables.num_items)
            items = np.sort(permute(np.arange(count), self.tables.num_items, self.seed, 0))
            rows = torch.cat([self.encode(items[i : i + BLOCK_ROWS]) for i in range(0, count, BLOCK_ROWS)])
            quantizer.start(rows.cpu().numpy(), self.seed)
        for name, tensor in quantizer.state_dict().items():
            if name != "usage":
                self.worker.broadcast(tensor)

    def encode(self, items: np.ndarray) -> torch.Tensor:
        """Encoder outputs of items, (n, D)."""
        return self.model.encode(self.model.standardise(self.tables.rows(items)))

    def code(self, items: np.ndarray) -> tuple[torch.Tensor, Quantized, dict[str, torch.Tensor]]:
        """Encoder outputs of items, what they become, and each decoder's squared errors."""
        standardised = self.model.standardise(self.tables.rows(items))
        hidden = self.model.encode(standardised)
        found = self.model.quantizer(hidden)
        return hidden, found, self.model.errors(found.values, standardised)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        self._indices = indices
        rows = self.tables.rows(local_part(indices, worker))
        return rows | {"count": len(indices) / worker.world_size}

    def after_step(self, step: int) -> None:
        """Codes learn from the whole batch, and dead ones move to residuals of items drawn from it."""
        worker, quantizer = self.worker, self.model.quantizer
        found = self.model.last
        quantizer.learn(worker.sum(quantizer.moments(found)))
        if not self.config.rqvae.revive_below:
            return
        dead = quantizer.dead()
        if not len(dead):
            return
        rng = np.random.default_rng([self.seed, step])
        places = rng.integers(len(self._indices), size=len(dead))
        own = np.flatnonzero(places % worker.world_size == worker.rank)
        rows = found.residuals.new_zeros(len(dead), found.residuals.shape[2])
        mine = torch.from_numpy(places[own] // worker.world_size).to(rows.device)
        at = torch.from_numpy(own).to(rows.device)
        rows[at] = found.residuals[mine, dead[at, 0]]
        quantizer.revive(dead, worker.sum(rows))

    @torch.no_grad()
    def validate(self, worker: Worker) -> dict[str, float]:
        """Share of the inputs' variance that the decoders give back from the codes, weighted as in the loss."""
        model, count = self.model, min(self.tables.num_items, VALIDATION_ITEMS)
        codes = torch.zeros(count, self.config.num_levels, dtype=torch.int64, device=worker.device)
        errors = torch.zeros(len(model.names), dtype=torch.float64, device=worker.device)
        for block in list(_blocks(0, count))[worker.rank :: worker.world_size]:
            worker.alive()
            _, found, parts = self.code(block)
            codes[block[0] : block[-1] + 1] = found.codes
            errors += torch.stack([part.double().mean(1).sum() for part in parts.values()])
        shares = 1.0 - worker.sum(errors).cpu().numpy() / count
        explained = dict(zip(model.names, shares.tolist()))
        metrics = {MONITOR: sum(model.weights[name] * share for name, share in explained.items())}
        metrics |= {f"explained_{name}": share for name, share in explained.items()}
        return metrics | {"unique": uniqueness(worker.sum(codes).cpu().numpy())["coverage"]}


def _blocks(start: int, end: int) -> Iterator[np.ndarray]:
    for first in range(start, end, BLOCK_ROWS):
        yield np.arange(first, min(first + BLOCK_ROWS, end))


def train_rqvae(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train, then write every item's latent vector (Zarr) and nearest codes.

    Writes model.safetensors, curves.jsonl, summary.json, rqvae.json, latent/ (Zarr), and codes.npy in scratch.
    """
    config = IdentifierConfig.model_validate(settings["identifiers"])
    tables = Tables(context.inputs, worker.device)
    task = RqvaeTask(config, tables, worker, settings["seed"])
    optim = config.rqvae.optim
    summary = train(
        task,
        TorchEngine(task.model, optim, worker),
        optim,
        worker,
        context,
        seed=settings["seed"],
        monitor=MONITOR,
        after_step=task.after_step,
        checkpoint_epochs=optim.evaluate_every,
    )
    task.model.load_state_dict(load_file(context.out / "model.safetensors"))
    task.model.eval()
    with exact_products(), torch.no_grad():
        facts = write_codes(task, worker, context.out, context.scratch)
    if worker.is_main:
        write_json(context.out / "summary.json", summary)
        write_json(context.out / "rqvae.json", facts)


def write_codes(task: RqvaeTask, worker: Worker, out: Path, scratch: Path) -> dict:
    """Latent vectors by shard, codes of all items on worker 0, and the final losses.

    Returns:
        'losses': mean squared errors a dimension in the inputs' own units, by input and in all (weighted, with the
        commitment); 'explained': share of each input's variance; 'commit'.
    """
    model, num_items = task.model, task.tables.num_items
    if worker.is_main:
        (out / LATENT).mkdir(exist_ok=True)
    worker.barrier()
    writer = EmbeddingWriter(out / LATENT, num_items, task.config.rqvae.latent_dim)
    codes = torch.zeros(num_items, task.config.num_levels, dtype=torch.int32)
    sums = {name: torch.zeros(2, dtype=torch.float64, device=worker.device) for name in [*model.names, "commit"]}
    scales = {name: getattr(model, f"scale_{name}")[1] for name in model.names}
    for shard in range(worker.rank, writer.num_shards, worker.world_size):
        start, end = shard_rows(shard, num_items, writer.rows_per_shard)
        latent = []
        for items in _blocks(start, end):
            hidden, found, errors = task.code(items)
            codes[items[0] : items[-1] + 1] = found.codes.int().cpu()
            latent.append(hidden.cpu().numpy())
            for name, error in errors.items():
                raw = (error * scales[name].square()).double().mean(1).sum()
                sums[name] += torch.stack([error.double().mean(1).sum(), raw])
            sums["commit"] += found.commit.double().sum()
        writer.write(shard, np.concatenate(latent))
    codes = worker.sum(codes.to(worker.device)).cpu()
    means = {name: (worker.sum(pair) / num_items).tolist() for name, pair in sums.items()}
    if worker.is_main:
        np.save(scratch / CODES, codes.numpy(), allow_pickle=False)
    worker.barrier()
    losses = {name: means[name][1] for name in model.names}
    weighted = sum(model.weights[name] * losses[name] for name in model.names)
    return {
        "losses": losses | {"total": weighted + task.config.rqvae.commit_weight * means["commit"][0]},
        "explained": {name: 1.0 - means[name][0] for name in model.names},
        "commit": means["commit"][0],
        "weights": model.weights,
    }
