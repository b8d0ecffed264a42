"""Plans of sweeps: what runs, under which names and settings, what is shared, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genrec_dist.config import Config, build_config
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage
from genrec_dist.studies.scaling.ladder import DEPTH_KEYS, RULES, Ladder
from genrec_dist.studies.scaling.plan import Plan, make_plan
from genrec_dist.studies.scaling.probe import StepTimes
from genrec_dist.studies.scaling.sweep_file import SweepFile, load_sweep
from genrec_dist.studies.scaling.sweep_folder import SweepFolder

BASE = {"generator": {"dim": 128, "num_heads": 4, "num_decoder_layers": 4, "optim": {"learning_rate": 0.001}}}


def stages_of(config: Config) -> list[Stage]:
    """catalog -> text -> fusion (by seed) -> model (by everything) -> evaluation."""
    build = lambda context: None  # noqa: E731
    catalog = Stage("catalog", 1, {}, {}, build)
    text = Stage("semantic", 1, config.semantic.model_dump(mode="json"), {"catalog": catalog}, build)
    fusion = Stage("fusion", 1, {"seed": config.seed, "dim": config.fusion.dim}, {"semantic": text}, build)
    settings = {"model": config.generator.model_dump(mode="json"), "seed": config.seed}
    model = Stage("generator", 1, settings, {"fusion": fusion}, build)
    return [catalog, text, fusion, model, Stage("evaluation", 1, {}, {"model": model}, build)]


@pytest.fixture
def plan(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def make(*overrides: str, check=lambda config: None, **settings) -> Plan:
        file = SweepFile.model_validate({"arms": {"prorec": {"config": "base.yaml"}}} | settings)
        return make_plan("s", file, tmp_path, stages_of, check, overrides)

    return make


def test_arms_depths_seeds_and_points_are_all_combined(plan):
    made = plan(
        arms={"a": {"config": "base.yaml"}, "b": {"config": "base.yaml", "set": {"fusion.dim": 64}}},
        depths=[1, 2],
        seeds=[0, 7],
        set={"generator.head": "per_level"},
        grid={"generator.dropout": [0.1, 0.2]},
        points=[{"generator.label_smoothing": 0.1}, {"generator.label_smoothing": 0.2}],
    )
    assert len(made.trials) == 2 * 2 * 2 * 2 * 2
    one = next(t for t in made.trials if t.name == "b-d2-s7-label_smoothing0.2-dropout0.1")
    config = one.config
    assert (config.fusion.dim, config.generator.num_decoder_layers, config.seed) == (64, 2, 7)
    assert (config.generator.dropout, config.generator.label_smoothing, config.generator.head) == (
        0.1,
        0.2,
        "per_level",
    )
    assert config.name == one.name
    assert one.settings == {
        "generator.label_smoothing": 0.2, "generator.dropout": 0.1, "generator.num_decoder_layers": 2
    }  # fmt: skip


def test_a_label_that_is_no_name_becomes_a_hash_that_does_not_depend_on_the_other_points(plan):
    point = {"evaluation.cutoffs": [1, 5, 10, 20], "generator.dropout": 0.125}
    first = plan(points=[point]).trials[0].name
    second = plan(points=[{"generator.dropout": 0.5}, point]).trials[1].name
    assert first == second
    assert first.startswith("prorec-s0-")
    assert len(first) == len("prorec-s0-") + 8


def test_without_depths_a_trial_has_its_configurations_own(plan):
    assert [(t.name, t.depth) for t in plan(seeds=[3]).trials] == [("prorec-s3", 4)]


def test_stages_that_the_same_trials_need_are_one_unit_and_come_before(plan):
    made = plan(depths=[1, 2, 4], seeds=[0, 1])
    shared = {unit.name: unit for unit in made.units if unit.shared}
    by_stages = {tuple(stage.name for stage in unit.stages): unit for unit in shared.values()}
    assert sorted(by_stages, key=len) == [("fusion",), ("catalog", "semantic")]  # one fusion a seed, see below
    assert len(shared) == 3
    fusions = [unit for unit in shared.values() if unit.stages[0].name == "fusion"]
    source = by_stages["catalog", "semantic"]
    assert all(unit.needs == (source.name,) for unit in fusions)
    assert {unit.config.seed for unit in fusions} == {0, 1}
    for unit in made.units:
        if not unit.shared:
            assert set(unit.needs) == {source.name} | {f.name for f in fusions if f.config.seed == unit.config.seed}
            assert {stage.name for stage in unit.stages} >= {"generator", "evaluation"}
    names = [unit.name for unit in made.units]
    assert all(names.index(need) < names.index(unit.name) for unit in made.units for need in unit.needs)


def test_a_single_trial_shares_nothing(plan):
    assert [unit.shared for unit in plan().units] == [False]


@pytest.mark.parametrize(
    ("overrides", "settings", "where"),
    [
        ((), {"depths": [1], "grid": {"generator.num_decoder_layers": [2]}}, "num_decoder_layers"),
        (("generator.num_decoder_layers=3",), {"depths": [1]}, "num_decoder_layers"),
        (("seed=3",), {}, "seed"),
        ((), {"grid": {"seed": [1, 2]}}, "seed"),
        (("generator.dropout=0.5",), {"grid": {"generator.dropout": [0.1]}}, "dropout"),
    ],
)
def test_what_is_swept_cannot_be_set_twice(plan, overrides, settings, where):
    with pytest.raises(ConfigError, match=where):
        plan(*overrides, **settings)


def test_two_trials_that_would_be_the_same_run_are_refused(plan):
    with pytest.raises(ConfigError, match="same settings"):
        plan(grid={"sasrec.dropout": [0.1, 0.2]})  # no stage of this method reads it


def test_every_trial_is_checked_before_anything_starts(plan):
    def refuse_deep(config: Config) -> None:
        if config.generator.num_decoder_layers == 32:
            raise ConfigError("too deep", where=config.name)

    with pytest.raises(ConfigError, match="prorec-d32-s0"):
        plan(depths=[1, 32], check=refuse_deep)
    with pytest.raises(ConfigError, match=r"generator\.dim|num_heads"):
        plan(grid={"generator.dim": [128, 130]})
    with pytest.raises(ConfigError, match="unknown key"):
        plan(grid={"generator.dropuot": [0.1]})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("arms: {}", "arms"),
        ("depths: [1]", "arms"),
        ("arms: {a: {config: x}}\ndepth: [1]", "depth"),
        ("arms: {a: {config: x}}\ndepths: [1, 1]", "depths"),
        ("arms: {a: {config: x}}\ndepths: [0]", "depths"),
        ("arms: {a: {config: x, sett: 1}}", "sett"),
        ("arms: {a: {config: x}}\nladder: os.system", "ladder"),
        ("arms: {a: {config: x}}\ngrid: {seed: []}", "grid"),
        ("arms: {../a: {config: x}}", "not a valid name"),
        ("- 1", "whole"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_sweep_file_is_refused(tmp_path, text, named):
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_sweep(file)


def test_shipped_sweeps_are_read_and_name_their_configurations():
    folder = Path(__file__).resolve().parents[2] / "configs" / "sweeps"
    for file in folder.glob("*.yaml"):
        sweep = load_sweep(file)
        assert all((folder / arm.config).is_file() for arm in sweep.arms.values())
    beauty = load_sweep(folder / "depth_beauty.yaml")
    assert beauty.depths == [1, 2, 4, 8, 12, 16, 24, 32]
    assert {"prorec", "hstu"} == set(beauty.arms)
    modalities = load_sweep(folder / "depth_beauty_modalities.yaml")
    assert {"prorec", "collaborative", "semantic"} == set(modalities.arms)
    assert modalities.depths == beauty.depths


@pytest.mark.parametrize("method", sorted(DEPTH_KEYS))
def test_every_rule_gives_a_valid_configuration_at_every_depth(method):
    base = build_config({"method": method})
    for rule in RULES:
        ladder = Ladder(rule, method)
        for depth in (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48):
            settings = ladder.settings(base, depth)
            values = base.model_dump()
            for key, value in settings.items():
                section, *rest = key.split(".")
                inner = values[section]
                for part in rest[:-1]:
                    inner = inner[part]
                inner[rest[-1]] = value
            assert ladder.depth_of(build_config(values)) == depth


def test_fixed_width_changes_the_layers_alone():
    assert Ladder("fixed_width", "prorec").settings(build_config({}), 32) == {"generator.num_decoder_layers": 32}


def test_co_scaled_by_hand():
    base, ladder = build_config(BASE), Ladder("co_scaled", "prorec")
    assert ladder.settings(base, 4) == {
        "generator.num_decoder_layers": 4, "generator.dim": 128, "generator.num_heads": 4,
        "generator.optim.learning_rate": 0.001,
    }  # fmt: skip
    assert ladder.settings(base, 16) == {
        "generator.num_decoder_layers": 16, "generator.dim": 512, "generator.num_heads": 16,
        "generator.optim.learning_rate": 0.0005,
    }  # fmt: skip
    one = ladder.settings(base, 1)
    assert (one["generator.dim"], one["generator.num_heads"]) == (32, 1)
    assert one["generator.optim.learning_rate"] == pytest.approx(0.002)


def test_a_method_without_layers_has_no_ladder():
    with pytest.raises(ConfigError, match="no depth"):
        Ladder("fixed_width", "popularity")


def test_step_times_are_a_line_that_neither_falls_nor_starts_below_zero():
    line = StepTimes((1e9, 4e9), (0.2, 0.5))
    assert line.of(1e9) == pytest.approx(0.2)
    assert line.of(10e9) == pytest.approx(1.1)
    assert StepTimes((1e9, 2e9), (0.3, 0.2)).of(8e9) == pytest.approx(0.2)
    assert StepTimes((1e9, 2e9), (0.1, 0.3)).of(4e9) == pytest.approx(0.6)
    assert StepTimes((1e9,), (0.1,)).of(3e9) == pytest.approx(0.3)


def nobody(trial) -> bool:
    return False


@pytest.fixture
def begun(plan, tmp_path) -> SweepFolder:
    """A sweep of two depths that has begun."""
    folder = SweepFolder(tmp_path / "runs", "s")
    folder.write(plan(depths=[1, 2]), {}, "s.yaml", tmp_path / "store", ["genrec"])
    return folder


def test_the_same_plan_again_is_no_change(plan, begun):
    assert begun.refuse_change(plan(depths=[2, 1]), nobody) == []
    assert begun.refuse_change(plan("runtime.num_workers=2", "report.tsne_items=0", depths=[1, 2]), nobody) == []


def test_a_changed_sweep_is_refused_with_the_difference(plan, begun):
    for welcome in (nobody, lambda trial: True):
        with pytest.raises(ConfigError, match=r"prorec-d1-s0: generator\.dropout was 0\.3, is 0\.5"):
            begun.refuse_change(plan(depths=[1, 2], set={"generator.dropout": 0.5}), welcome)
        with pytest.raises(ConfigError, match="prorec-d2-s0: was there"):
            begun.refuse_change(plan(depths=[1]), welcome)


def test_new_trials_are_welcome_only_when_asked_for(plan, begun):
    with pytest.raises(ConfigError, match="prorec-d3-s0: new"):
        begun.refuse_change(plan(depths=[1, 2, 3]), nobody)
    assert begun.refuse_change(plan(depths=[1, 2, 3]), lambda trial: True) == ["prorec-d3-s0"]
    with pytest.raises(ConfigError, match="prorec-d3-s0: new") as caught:
        begun.refuse_change(plan(depths=[1, 2, 3, 4]), lambda trial: trial.depth == 4)
    assert "prorec-d4-s0" not in str(caught.value)


def test_a_unit_is_read_back_as_it_was_planned(plan, begun):
    planned = plan(depths=[1, 2])
    for unit in planned.units:
        read = begun.unit(unit.name, stages_of, {"num_threads": 2})
        assert (read.name, read.shared, read.needs) == (unit.name, unit.shared, unit.needs)
        assert {(s.name, s.key) for s in read.stages} == {(s.name, s.key) for s in unit.stages}
        assert read.config.runtime.num_threads == 2
        assert read.config.generator == unit.config.generator
    with pytest.raises(ConfigError, match="no such unit"):
        begun.unit("other", stages_of, {})


def test_a_unit_whose_stages_have_changed_since_is_refused(plan, begun):
    def other(config: Config) -> list[Stage]:
        return [Stage("catalog", 2, {}, {}, lambda context: None)]

    with pytest.raises(ConfigError, match="another content hash"):
        begun.unit("prorec-d1-s0", other, {})
