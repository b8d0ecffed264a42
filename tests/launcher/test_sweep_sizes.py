"""What trials are reckoned to take of a GPU, against what they took of one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from genrec_dist.config import Config, build_config, merge_setting
from genrec_dist.evaluation.dense import HELD
from genrec_dist.studies.memory import search_memory
from genrec_dist.studies.sizes import Counts
from launcher.dryrun import section_loop
from launcher.sweep import needs_of
from launcher.sweep_machine import GIB, GPU_PROCESS_BYTES, MARGIN, PROCESS_BYTES, Machine
from launcher.sweep_sizes import SCORES, TrialSize, gpu_memory

CONFIGS = Path(__file__).parents[2] / "configs"
BEAUTY = Counts(22_363, 12_101, 198_502)
FILES = {"generator": "frozen/prorec_beauty_time.yaml", "hstu": "hstu_beauty.yaml"}
UNTAUGHT = {"generator.teacher_weight": 0, "generator.item_embedding_rate": 0}
"""As the recipe was when the numbers below were measured."""
KEYS = {"generator": "num_decoder_layers", "hstu": "num_layers"}
MIB = 1 << 20


def trial(section: str, depth: int, **settings) -> Config:
    """A trial of configs/sweeps/depth_beauty.yaml."""
    values = yaml.safe_load((CONFIGS / FILES[section]).read_text())
    both = {f"{section}.{KEYS[section]}": depth, "hstu.optim.ema_decay": 0.999, "runtime.backend": "local", "name": "t"}
    for key, value in (both | UNTAUGHT | settings).items():
        merge_setting(values, key, value)
    return build_config(values)


def estimate(section: str, depth: int, counts: Counts = BEAUTY, **settings) -> float:
    config = trial(section, depth, **settings)
    loop, codebook = section_loop(config, section, counts, {}, [])
    return gpu_memory(config, section, loop, counts, codebook)


@pytest.mark.parametrize(
    ("section", "depth", "process"),
    [
        ("generator", 1, 2850), ("generator", 2, 3348), ("generator", 4, 4388), ("generator", 8, 6226),
        ("generator", 12, 9010), ("generator", 16, 10470), ("generator", 24, 14564), ("generator", 32, 18708),
        ("hstu", 8, 2674), ("hstu", 32, 2742),
    ],
)  # fmt: skip
def test_estimates_are_near_what_processes_took_of_an_h100(section: str, depth: int, process: int) -> None:
    """MiB of a process as nvidia-smi showed them while the sweep ran, of 12 layers as an error message did."""
    found = estimate(section, depth) * MARGIN + GPU_PROCESS_BYTES
    assert 0.85 < found / (process * MIB) < 1.25


@pytest.mark.parametrize(
    ("section", "peaks"),
    [
        ("generator", {1: 813, 2: 1171, 4: 1885, 8: 3312, 12: 4741, 16: 6169, 24: 9025, 32: 11882}),
        ("hstu", {1: 582, 2: 583, 4: 592, 8: 685, 12: 777, 16: 869, 24: 1056, 32: 1238}),
    ],
)
def test_estimates_are_above_the_peaks_of_the_allocator(section: str, peaks: dict[int, int]) -> None:
    """MiB in use at the most up to the second validation; the reserve of training and validation is more."""
    for depth, peak in peaks.items():
        assert 1.2 < estimate(section, depth) / (peak * MIB) < 1.7


@pytest.mark.parametrize(
    ("counts", "more"), [(BEAUTY, 1121 - 872), (Counts(35_598, 18_357, 296_337), 1409 - 1009)], ids=["beauty", "sports"]
)
def test_a_teacher_takes_what_it_took_of_an_h100(counts: Counts, more: int) -> None:
    """MiB in use at the most before the first validation, with a teacher less those without."""
    of = lambda **settings: section_loop(trial("generator", 4, **settings), "generator", counts, {}, [])[0]  # noqa: E731
    taught, alone = of(**{"generator.teacher_weight": 0.5}), of()
    assert 0.8 < (sum(taught.memory.values()) - sum(alone.memory.values())) / (more * MIB) < 1.2


def test_a_validation_comes_on_top_of_the_training_and_is_as_large_as_its_batch() -> None:
    config = trial("generator", 4)
    loop, codebook = section_loop(config, "generator", BEAUTY, {}, [])
    assert codebook is not None
    search = estimate("generator", 4) - sum(loop.memory.values())
    assert search == search_memory(config.generator, codebook, (1 << 15) // 20, 20)
    few = Counts(100, 12_101, 900)
    assert estimate("generator", 4, few) - sum(loop.memory.values()) == search_memory(
        config.generator, codebook, 100, 50
    )
    wide = estimate("generator", 4, **{"runtime.eval_batch_size": 4096}) - sum(loop.memory.values())
    assert wide == search_memory(config.generator, codebook, 4096, 50)
    loop, none = section_loop(trial("hstu", 4), "hstu", BEAUTY, {}, [])
    assert none is None
    padding = 4 * loop.size.padded_values * loop.batches.per_worker
    assert estimate("hstu", 4) == sum(loop.memory.values()) + padding + SCORES * 4 * HELD


def test_a_share_of_a_gpu_goes_by_both_and_memory_of_a_cpu_by_the_training() -> None:
    config: Any = trial("generator", 32)
    loop, codebook = section_loop(config, "generator", BEAUTY, {}, [])
    size = TrialSize(SimpleNamespace(name="t", config=config), "generator", loop, BEAUTY, codebook, 128, [])
    sweep: Any = SimpleNamespace(config=config, plan=SimpleNamespace(units=[]))
    on_cpu = needs_of(sweep, [size], [Machine(8, 64 * GIB)], 0)["t"]
    assert (on_cpu.memory, on_cpu.gpu) == (sum(loop.memory.values()) * MARGIN + PROCESS_BYTES, 0.0)
    assert needs_of(sweep, [size], [Machine(8, 64 * GIB, (80 * GIB,))], 0)["t"].gpu == pytest.approx(0.3)
    small = needs_of(sweep, [size], [Machine(8, 64 * GIB, (8 * GIB,))], 0)["t"]  # a validation's batch is cut to fit
    assert small.gpu == 1.0
