"""HSTU against its equations in float64, what it may and may not see, its loss, its training under every engine."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.baselines.hstu import HstuModel, time_buckets
from genrec_dist.baselines.hstu_stage import hstu_stage, train_hstu
from genrec_dist.catalog.dataset import NO_TIMESTAMP
from genrec_dist.collaborative.losses import full_softmax, similarity
from genrec_dist.config import Config, HstuConfig, RuntimeConfig
from genrec_dist.evaluation.dense import dense_ranks
from genrec_dist.evaluation.ranking import rank_users
from genrec_dist.generator.transformer import checkpoint_activations
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.testing.faults import FaultyTask, InjectedFault
from genrec_dist.testing.tiny import randomise, tiny_histories, tiny_optim, tiny_sequences, write_tiny_catalog
from genrec_dist.testing.tiny_tasks import hstu_task, make
from genrec_dist.training.loop import train
from genrec_dist.training.meter import MEASURED
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS, WIDTH, DAY = 18, 6, 86_400


def make_model(**settings) -> HstuModel:
    torch.manual_seed(0)
    settings = {"temperature": 0.25, "num_layers": 2, "position_buckets": 4, "time_buckets": 50} | settings
    model = HstuModel(HstuConfig(dim=8, num_heads=2, dropout=0.0, max_history=WIDTH, **settings), NUM_ITEMS)
    randomise(model, 0.4)
    return model.eval()


def make_batch(users: int = 5) -> dict:
    history, mask = tiny_histories(users, NUM_ITEMS, WIDTH)
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.integers(0, 40, (users, WIDTH + 1)), 1) * DAY
    times[1, 0] = times[2, 2] = NO_TIMESTAMP
    targets = torch.from_numpy(rng.integers(0, NUM_ITEMS, history.shape))
    return {
        "history": history,
        "mask": mask,
        "times": torch.from_numpy(times),
        "targets": targets,
        "count": float(mask.sum()),
    }


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def plain_states(model: HstuModel, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The paper's equations for one user, place by place and head by head, in float64."""
    config = model.config
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    places, dim, heads = len(items), config.dim, config.num_heads
    x = weights["item.weight"][items] * np.sqrt(dim) + weights["position.weight"][:places]
    for layer in range(config.num_layers):
        every = silu(norm(x) @ weights[f"layers.{layer}.uvqk.weight"].T)
        u, v, q, k = np.split(every, 4, axis=-1)
        read = np.zeros_like(x)
        for i in range(places):
            asked = times[i + 1] if config.query_time == "target" else times[i]
            for h in range(heads):
                part = slice(h * dim // heads, (h + 1) * dim // heads)
                for j in range(i + 1):
                    if NO_TIMESTAMP in (asked, times[j]):
                        bucket = config.time_buckets
                    else:
                        apart = max(1, abs(int(asked) - int(times[j])))
                        bucket = min(int(math.log(apart) / 0.301), config.time_buckets - 1)
                    rab = weights["time_bias.weight"][bucket, layer]
                    rab += weights["place_bias.weight"][min(i - j, config.position_buckets - 1), layer]
                    read[i, part] += silu(q[i, part] @ k[j, part] + rab) / config.max_history * v[j, part]
        out = norm(read) * u
        x = x + out @ weights[f"layers.{layer}.out.weight"].T + weights[f"layers.{layer}.out.bias"]
    return x


@torch.no_grad()
@pytest.mark.parametrize("query_time", ["item", "target"])
def test_states_are_those_of_the_equations(query_time):
    model, batch = make_model(query_time=query_time).double(), make_batch()
    states = model.states(batch["history"], batch["times"])
    for row, keep, times, found in zip(batch["history"], batch["mask"], batch["times"], states):
        length = int(keep.sum())
        expected = plain_states(model, row[:length].numpy(), times[: length + 1].numpy())
        np.testing.assert_allclose(found[:length].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_time_buckets_by_hand():
    """Multiples of .301 in the natural logarithm: 0 and 1 s are 0, a day (ln 11.37) 37, a week 44, seven years 63."""
    seconds = torch.tensor([0, 1, DAY, -DAY, 7 * DAY, 7 * 365 * DAY, 40 * 365 * DAY])
    assert time_buckets(seconds, torch.zeros(1, dtype=torch.int64), 64).tolist() == [0, 0, 37, 37, 44, 63, 63]
    unknown = torch.tensor([NO_TIMESTAMP, NO_TIMESTAMP])
    assert time_buckets(unknown, torch.tensor([5, NO_TIMESTAMP]), 64).tolist() == [64, 64]


@torch.no_grad()
def test_no_place_sees_later_items_or_their_times():
    model, batch = make_model(), make_batch()
    before = model.states(batch["history"], batch["times"])
    batch["history"][:, 3:], batch["times"][:, 3:] = 7, 9 * DAY
    after = model.states(batch["history"], batch["times"])
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


@torch.no_grad()
def test_who_knows_the_time_of_the_target():
    batch = make_batch()
    last = batch["mask"].sum(1, keepdim=True)
    later = batch | {"times": batch["times"].scatter(1, last, batch["times"].gather(1, last) + 400 * DAY)}
    inputs = ("history", "mask", "times")
    for query_time in ("item", "target"):
        model = make_model(query_time=query_time)
        scores = [model.score_catalog(*(b[name] for name in inputs)) for b in (batch, later)]
        assert torch.equal(*scores) == (query_time == "item")


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["cosine", "inner"])
def test_loss_is_the_mean_over_places_of_the_catalog_cross_entropy(similarity):
    model, batch = make_model(similarity=similarity), make_batch()
    scale, total = 4.0 if similarity == "cosine" else 1.0, 0.0
    for row, keep, times, target in zip(batch["history"], batch["mask"], batch["times"], batch["targets"]):
        for place in range(int(keep.sum())):
            part = row[None, : place + 1], keep[None, : place + 1], times[None, : place + 2]
            weights = (model.score_catalog(*part)[0].double() * scale).exp()
            total -= math.log(weights[target[place]] / weights.sum())
    assert float(model(batch)["loss"]) == pytest.approx(total / int(batch["mask"].sum()), rel=1e-5)


def test_a_step_on_a_gpu_waits_for_nothing(monkeypatch):
    """Tensors without values, as none on a CPU: an operation whose shape or value depends on them is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # does not know them
    model, batch = make_model().to("meta"), make_batch()
    batch = {name: torch.as_tensor(value).to("meta") for name, value in batch.items()}
    model(batch)["loss"].backward()
    with pytest.raises(NotImplementedError):
        batch["history"][batch["mask"]]


def test_rows_of_padding_add_nothing():
    """What a GPU computes, padding and all, is the loss of the places that exist."""
    model, batch = make_model(), make_batch()
    states, targets = model.states(batch["history"], batch["times"]), batch["targets"]
    plain = model(batch)["loss"]
    logits = similarity(states.flatten(0, 1), model.item.weight, "cosine") * 4
    padded = full_softmax(logits, targets.masked_fill(~batch["mask"], -100).flatten()) / batch["count"]
    torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("depth", [2, 32])
def test_recomputed_activations_give_the_same_gradients(depth):
    grads = []
    for again in (False, True):
        model = make_model(num_layers=depth)
        torch.manual_seed(1)
        if again:
            checkpoint_activations(model)
        model.train()
        model(make_batch())["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads):
        assert torch.equal(plain, recomputed)


def context_of(folder, inputs=None) -> StageContext:
    folder.mkdir(exist_ok=True)
    return StageContext(folder, inputs or {}, RuntimeConfig(backend="local", checkpoint_minutes=1e-9))


def test_training_writes_the_artifact_and_evaluation_ranks_with_it(tmp_path):
    sequences = tiny_sequences(30, NUM_ITEMS, shortest=4)
    catalog = write_tiny_catalog(tmp_path / "catalog", sequences)
    section = HstuConfig(dim=8, max_history=4, optim=tiny_optim(epochs=3))
    settings = {"hstu": section.model_dump(mode="json"), "order": "time", "seed": 0, "validation_users": 0}
    context = context_of(tmp_path / "hstu", {"catalog": catalog})
    train_hstu(Worker(), context, settings)
    model = HstuModel(section, NUM_ITEMS)
    model.load_state_dict(load_file(context.out / "model.safetensors"), strict=True)
    summary, curves = read_json(context.out / "summary.json"), read_jsonl(context.out / "curves.jsonl")
    valid = [record for record in curves if record["split"] == "valid"]
    assert [record["flops"] for record in valid] == pytest.approx([summary["flops"] * n / 3 for n in (1, 2, 3)])
    assert summary["best_flops"] == next(r["flops"] for r in valid if r["step"] == summary["best_step"])
    assert all(0 < record["bits_per_item"] < 20 for record in valid)
    assert summary["num_parameters"]["layers"] == sum(p.numel() for p in model.layers.parameters())
    samples, _ = holdout_samples(sequences, 4, "test", torch.device("cpu"), times=True)
    evaluation = {
        "method": "hstu",
        "order": "time",
        "seed": 0,
        "hstu": settings["hstu"],
        "evaluation": {"cutoffs": [1, 10]},
    }
    ranks = rank_users(Worker(), {"catalog": catalog, "hstu": context.out}, evaluation, RuntimeConfig(), ["test"])
    model.eval()
    expected = dense_ranks(
        lambda batch: model.score_catalog(batch["history"], batch["mask"], batch["times"]), samples, 4, Worker()
    )
    assert ranks["test"]["rank"].tolist() == expected.tolist()


def outcome(folder, summary: dict, engine) -> tuple:
    curves = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_jsonl(folder / "curves.jsonl")]
    state = {name: tensor.numpy().tobytes() for name, tensor in engine.state().items()}
    return {k: v for k, v in summary.items() if k not in MEASURED}, curves, state


def run(folder, kind: str = "torch", **faults) -> tuple:
    task = hstu_task(Worker(), dropout=0.3, epochs=3, batch_size=5)
    engine = make(kind, task, Worker())
    wrapped = FaultyTask(task, **faults) if faults else task
    return outcome(folder, train(wrapped, engine, task.config.optim, Worker(), context_of(folder), seed=1), engine)


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(InjectedFault):
        run(tmp_path / "killed", crash_at=4)
    assert run(tmp_path / "killed") == whole


@pytest.mark.parametrize("kind", [pytest.param("zero0", marks=pytest.mark.slow), "zero3"])
def test_deepspeed_takes_the_same_steps(kind):
    parameters = []
    for engine_kind in ("torch", kind):
        task = hstu_task(Worker(), batch_size=5)
        engine = make(engine_kind, task, Worker())
        for step in range(4):
            engine.backward(engine.forward(task.batch(task.order.batch(step), Worker()))["loss"])
            engine.step(1e-2)
        parameters.append({k: v for k, v in engine.state().items() if k.startswith("model/")})
    assert parameters[0].keys() == parameters[1].keys()
    for name, value in parameters[0].items():
        torch.testing.assert_close(parameters[1][name], value, atol=3e-6, rtol=1e-5, msg=name)


def test_settings_name_the_artifact():
    catalog = Stage("catalog", 1, {}, {}, lambda context: None)
    plain = hstu_stage(Config(), catalog)
    assert hstu_stage(Config(runtime=RuntimeConfig(num_workers=4)), catalog).key == plain.key
    assert hstu_stage(Config(hstu={"num_layers": 3}), catalog).key != plain.key
