"""Training samples and held-out histories against plain loops over the users."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.generator.stage import GeneratorTask, flops_per_level, mean_codebook, step_costs
from genrec_dist.studies.sizes import generator_size
from genrec_dist.testing.tiny import tiny_generator, tiny_optim, tiny_sequences, tiny_trie
from genrec_dist.training.samples import holdout_samples, prefix_samples, row_samples
from genrec_dist.training.tasks import PrefixBatches, RowBatches, alignment_batch, least_padding, uniform_negatives
from genrec_dist.training.worker import Worker

CPU = torch.device("cpu")


def by_user(sequences: Sequences) -> list[list[int]]:
    return [sequences.items[a:b].tolist() for a, b in zip(sequences.indptr[:-1], sequences.indptr[1:])]


def train_part(items: list[int]) -> list[int]:
    return items[:-2] if len(items) >= 3 else items


def rows(batch: dict) -> list[tuple[list[int], int]]:
    return [(h[m].tolist(), int(t)) for h, m, t in zip(batch["history"], batch["mask"], batch["target"])]


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@pytest.mark.parametrize("resident", [False, True])
def test_times_go_with_the_items_and_one_behind(resident):
    sequences = tiny_sequences(20, 30, shortest=2)
    times = dict(enumerate(sequences.timestamps.tolist()))
    rows = row_samples(sequences, 4, CPU, resident, times=True)
    held, _ = holdout_samples(sequences, 4, "test", CPU, resident, times=True)
    for samples in (rows, held):
        every = torch.arange(len(samples))
        batch = samples.gather(every, 4)
        starts, stops = samples.spans.places(every.numpy())
        assert batch["times"].shape == (len(samples), 5)
        assert batch["times"].dtype == torch.int64
        for found, start, stop in zip(batch["times"].tolist(), starts, stops):
            assert found[: stop - start + 1] == [times[place] for place in range(start, stop + 1)]
    assert "times" not in row_samples(sequences, 4, CPU, resident).gather(torch.arange(3))


def sequences_of(lengths: list[int]) -> Sequences:
    total = sum(lengths)
    items = np.random.default_rng(total).permutation(100)[:total].astype(np.int32)
    return Sequences(np.concatenate([[0], np.cumsum(lengths)]), items, np.zeros(total, np.int64), 100)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 6))
def test_prefix_samples_against_loops(lengths, window):
    sequences = sequences_of(lengths)
    expected = [
        (part[max(0, n - window) : n], part[n])
        for part in map(train_part, by_user(sequences))
        for n in range(1, len(part))
    ]
    samples = prefix_samples(sequences, window, CPU)
    assert len(samples) == len(expected)
    assert samples.lengths[np.arange(len(samples))].tolist() == [len(history) for history, _ in expected]
    assert samples.tokens_of(np.arange(len(samples))) == sum(len(history) for history, _ in expected)
    if expected:
        assert rows(samples.gather(torch.arange(len(expected)), window)) == expected


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.sampled_from(["valid", "test"]))
def test_holdout_samples_against_loops(lengths, window, split):
    sequences = sequences_of(lengths)
    cut = -2 if split == "valid" else -1
    expected = [
        (user, items[:cut][-window:], items[cut]) for user, items in enumerate(by_user(sequences)) if len(items) >= 3
    ]
    samples, users = holdout_samples(sequences, window, split, CPU)
    assert users.tolist() == [user for user, _, _ in expected]
    if expected:
        assert rows(samples.gather(torch.arange(len(expected)), window)) == [(h, t) for _, h, t in expected]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.sampled_from(["prefix", "valid", "test", "row"]), st.data())
def test_a_device_gathers_what_the_host_gathers(lengths, window, kind, data):
    """The device's way, on the CPU: the same function on tensors."""
    sequences = sequences_of(lengths)
    samples_of = {"prefix": prefix_samples, "row": row_samples}
    host, device = (
        samples_of[kind](sequences, window, CPU, resident)
        if kind in samples_of
        else holdout_samples(sequences, window, kind, CPU, resident)[0]
        for resident in (False, True)
    )
    assert len(host) == len(device)
    if not len(host):
        return
    chosen = np.array(data.draw(st.lists(st.integers(0, len(host) - 1), min_size=1, max_size=9)))
    if kind != "row":  # cut to the longest, where nothing has to be waited for
        longest = int(host.lengths[chosen].max())
        assert host.gather(torch.from_numpy(chosen))["mask"].shape[1] == longest
        assert device.gather(chosen)["mask"].shape[1] == longest
        assert device.gather(torch.from_numpy(chosen))["mask"].shape[1] == window
    one = host.gather(chosen, window)
    for indices in (chosen, torch.from_numpy(chosen)):
        same_batch(one, device.gather(indices, window))
        same_batch(one, host.gather(indices, window))
    assert host.tokens_of(chosen) == device.tokens_of(torch.from_numpy(chosen))


def same_batch(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype == (torch.bool if name == "mask" else torch.int64)
        assert torch.equal(tensor, other[name]), name


def test_samples_share_one_copy_on_a_device_and_leave_the_host_alone():
    sequences = tiny_sequences(20, 15)
    sequences.items.flags.writeable = False  # as a mapped array is
    prefixes = prefix_samples(sequences, 4, CPU, resident=True)
    held, _ = holdout_samples(sequences, 4, "valid", CPU, resident=True)
    assert prefixes._items is held._items
    assert prefixes._spans.indptr is held._spans.indptr
    assert prefixes._items.dtype == torch.int32
    batch = prefix_samples(sequences, 4, CPU).gather(np.arange(5), 4)
    assert all(torch.equal(value, prefixes.gather(torch.arange(5), 4)[name]) for name, value in batch.items())


def test_memory_grows_with_users_not_with_interactions():
    lengths = np.full(50, 2000)
    items = np.zeros(lengths.sum(), np.int32)
    sequences = Sequences(np.concatenate([[0], np.cumsum(lengths)]), items, np.zeros(0, np.int64), 1)
    tracemalloc.start()
    for samples in (prefix_samples(sequences, 20, CPU), row_samples(sequences, 20, CPU)):
        samples.gather(np.arange(10), 20)
    assert holdout_samples(sequences, 20, "test", CPU)[0].items is items
    assert tracemalloc.get_traced_memory()[1] < 50_000  # an int32 a prefix would be 400 kB
    tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 6))
def test_row_samples_predict_every_next_item_once(lengths, width):
    sequences = sequences_of(lengths)
    expected = []
    for part in map(train_part, by_user(sequences)):
        for start in range(0, len(part) - 1, width):
            inputs = part[start : start + width][: len(part) - 1 - start]
            expected.append((inputs, part[start + 1 : start + 1 + len(inputs)]))
    samples = row_samples(sequences, width, CPU)
    assert len(samples) == len(expected)
    if expected:
        batch = samples.gather(torch.arange(len(expected)))
        got = [(h[m].tolist(), t[m].tolist()) for h, t, m in zip(batch["history"], batch["targets"], batch["mask"])]
        assert got == expected


def test_the_held_out_items_of_a_user_never_train():
    sequences = tiny_sequences(50, 40, seed=3)
    seen = {(u, n) for u, items in enumerate(by_user(sequences)) for n in range(len(train_part(items)))}
    for samples in (prefix_samples(sequences, 5, CPU), row_samples(sequences, 5, CPU)):
        _, last = samples.spans.places(np.arange(len(samples)))
        user = np.searchsorted(sequences.indptr, last, side="right") - 1
        assert {(int(u), int(t - sequences.indptr[u])) for u, t in zip(user, last)} <= seen


def test_padding_is_masked_and_in_range():
    samples = prefix_samples(tiny_sequences(20, 15), 4, CPU)
    batch = samples.gather(torch.arange(len(samples)), 9)
    assert batch["history"].shape == (len(samples), 9)
    assert (batch["history"][~batch["mask"]] == 0).all()
    assert batch["mask"].sum(1).tolist() == samples.lengths[np.arange(len(samples))].tolist()
    assert (batch["mask"].int().diff(dim=1) <= 0).all()  # right-padded


@pytest.mark.parametrize("buckets", [0, 3])
def test_workers_share_out_each_global_batch(buckets):
    sequences = tiny_sequences(30, 20)
    batches = PrefixBatches.build(sequences, 4, 10, 0, buckets, CPU)
    for step in range(batches.order.steps_per_epoch):
        indices = batches.order.batch(step)
        whole = batches.local(indices, Worker())
        parts = [batches.local(indices, Worker(rank, 3)) for rank in range(3)]
        assert sorted(row for part in parts for row in rows(part)) == sorted(rows(whole))
        assert all(part["count"] * 3 == pytest.approx(len(indices)) for part in parts)
        assert batches.target_items(indices).tolist() == whole["target"].tolist()
        assert batches.tokens_of(indices) == whole["mask"].sum()
        pieces = batches.local_parts(indices, Worker(), 4)
        assert sorted(row for piece in pieces for row in rows(piece)) == sorted(rows(whole))
        assert len(pieces) == 4
        assert all(piece["count"] == whole["count"] for piece in pieces)
        assert all(piece["mask"][:, -1].any() for piece in pieces if len(piece["mask"]))
        assert whole["history"].shape[1] == whole["mask"].sum(1).max()  # no column of padding alone


def test_batches_of_like_code_length_cut_the_decoder_and_not_the_loss():
    trie = tiny_trie(20, 4)
    assert len(np.unique(trie.depth)) > 1
    model, cut = tiny_generator(trie, head="child", distill_position="start").eval(), 0
    batches = PrefixBatches.build(tiny_sequences(60, 20), 6, 8, 0, 16, CPU, trie.depth)
    taken = []
    for step in range(batches.order.steps_per_epoch):
        indices = batches.order.batch(step)
        taken += indices.tolist()
        batch = batches.local(indices, Worker())
        assert batch["levels"] == trie.depth[batch["target"]].max()
        assert all(batches.local(indices, Worker(rank, 3))["levels"] == batch["levels"] for rank in range(3))
        cut += batch["levels"] < trie.max_depth
        if step < 8:
            whole = model({name: value for name, value in batch.items() if name != "levels"})
            torch.testing.assert_close(model(batch), whole)
    assert sorted(taken) == list(range(batches.order.num_samples))
    shallow = (trie.depth[batches.samples.targets(np.arange(len(taken)))] < trie.max_depth).mean()
    assert cut >= shallow * batches.order.steps_per_epoch - 1 - batches.order.steps_per_epoch // 16


def test_costs_go_by_the_codes_of_a_batch():
    """The costs of a mean batch, and what its targets are deeper; as the formula has it for trees of such a depth."""
    validation = {"seed": 0, "validation_beam": 10, "validation_users": 0, "mix_weight": 0.0}
    model = tiny_generator(
        tiny_trie(20, 4), head="child", depth_buckets=True, optim=tiny_optim(batch_size=8, length_buckets=16)
    )
    task = GeneratorTask(model, tiny_sequences(60, 20), Worker(), validation)
    depths, mean = task.batches.depths, float(model.trie.depth.float().mean())
    per_target = step_costs(model)[1] - mean
    for step in range(task.order.steps_per_epoch):
        indices = task.order.batch(step)
        places = task.batches.tokens_of(indices) + (depths[task.batches.target_items(indices)] + per_target).sum()
        assert task.tokens(indices) == pytest.approx(places, abs=1)
    book = mean_codebook(model.trie)
    sizes = [
        generator_size(model.config, replace(book, max_depth=depth), 20, model.integrated.shape[1]).training_flops
        for depth in (mean, mean + 1)
    ]
    assert flops_per_level(model, per_target + mean) == pytest.approx(sizes[1] - sizes[0])


def test_the_losses_of_parts_add_up_to_that_of_the_batch():
    model = tiny_generator(tiny_trie(20, 4), head="child", distill_weight=0.0)
    batches = PrefixBatches.build(tiny_sequences(30, 20), 6, 16, 0, 0, CPU)
    indices = batches.order.batch(2)
    gradients = []
    for parts in (1, 3, 50):
        model.zero_grad()
        loss = sum(model(part)["loss"] for part in batches.local_parts(indices, Worker(), parts))
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    assert batches.local_parts(indices[:0], Worker(), 3)[0]["target"].shape == (0,)


def test_windows_share_out_and_count_targets():
    batches = RowBatches.build(tiny_sequences(30, 20), 4, 8, 0, CPU)
    indices = batches.order.batch(1)
    whole = batches.local(indices, Worker())
    parts = [batches.local(indices, Worker(rank, 2)) for rank in range(2)]
    assert whole["count"] == float(whole["mask"].sum())
    assert [part["count"] for part in parts] == [whole["count"] / 2] * 2
    assert sum(int(part["mask"].sum()) for part in parts) == whole["count"] == batches.tokens_of(indices)
    assert batches.target_items(indices).tolist() == whole["targets"][whole["mask"]].tolist()


def test_alignment_items_are_distinct_and_shared_out():
    parts = [alignment_batch(np.array([5, 2, 5, 9, 2]), Worker(rank, 2)) for rank in range(2)]
    assert all(part["align_items"].tolist() == [2, 5, 9] for part in parts)
    assert [part["align_anchors"].tolist() for part in parts] == [[0, 2], [1]]
    assert [part["align_count"] for part in parts] == [1.5, 1.5]


def test_negatives_are_a_function_of_the_batch():
    first, second = np.array([3, 1, 4]), np.array([3, 1, 5])
    draw = lambda seed, indices: uniform_negatives(50, 8, seed, indices, CPU).tolist()  # noqa: E731
    assert draw(0, first) == draw(0, first.copy())
    assert draw(0, first) != draw(0, second)
    assert draw(0, first) != draw(1, first)
    many = np.bincount(uniform_negatives(10, 20_000, 0, first, CPU).numpy(), minlength=10)
    assert many.min() > 1800


def test_rows_of_like_length_are_cut_and_lose_nothing():
    sequences = tiny_sequences(60, 30, seed=2, longest=12)
    whole = RowBatches.build(sequences, 8, 8, 0, torch.device("cpu"))
    cut = RowBatches.build(sequences, 8, 8, 0, torch.device("cpu"), buckets=3)

    def targets(batches: RowBatches) -> tuple[list[int], int]:
        found, places = [], 0
        for step in range(batches.order.steps_per_epoch):
            rows = batches.local(batches.order.batch(step), Worker())
            assert rows["mask"].any(0).all() or not batches.order.buckets
            found += rows["targets"][rows["mask"]].tolist()
            places += rows["mask"].numel()
        return sorted(found), places

    (all_targets, all_places), (cut_targets, cut_places) = targets(whole), targets(cut)
    assert cut_targets == all_targets
    assert cut_places < 0.8 * all_places


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=9), st.integers(1, 4))
def test_parts_are_cut_where_padding_is_least(lengths, parts):
    lengths = np.sort(np.array(lengths, np.int64))

    def places(cuts) -> int:
        return sum(len(piece) * int(piece.max(initial=0)) for piece in np.split(lengths, cuts))

    cuts = least_padding(lengths, parts)
    assert len(cuts) == parts - 1
    every = itertools.combinations_with_replacement(range(len(lengths) + 1), parts - 1)
    assert places(cuts) == min(places(list(other)) for other in every)
