"""Method name -> its stages. Reading a function here tells the whole method."""

from __future__ import annotations

from genrec_dist.artifacts.files import read_json
from genrec_dist.baselines.hstu_stage import hstu_stage
from genrec_dist.baselines.sasrec import sasrec_stage
from genrec_dist.catalog.stage import catalog_stage
from genrec_dist.collaborative.lightgcn_stage import lightgcn_stage
from genrec_dist.collaborative.stage import fusion_stage
from genrec_dist.config import WITHOUT_EVALUATION, Config
from genrec_dist.evaluation.collaborative import rank_count_stage
from genrec_dist.evaluation.stage import evaluation_stage
from genrec_dist.generator.gpt_stage import gpt_stage
from genrec_dist.generator.stage import generator_stage
from genrec_dist.graph.stage import graph_stage, partition_stage
from genrec_dist.identifiers.stage import identifier_stage
from genrec_dist.pipeline import Stage
from genrec_dist.runs import RunFolder
from genrec_dist.semantic.stage import semantic_stage


def prorec(config: Config, catalog: Stage) -> list[Stage]:
    """PRORec: fuse text and behaviour, cluster into unicodes, generate the next item's code."""
    semantic = semantic_stage(config, catalog)
    fusion = fusion_stage(config, catalog, semantic)
    identifiers = identifier_stage(config, {"fusion": fusion})
    generator = generator_stage(config, catalog, semantic, fusion, identifiers)
    inputs = {"catalog": catalog, "fusion": fusion, "identifiers": identifiers, "generator": generator}
    return [semantic, fusion, identifiers, generator, evaluation_stage(config, "generator", inputs, "evaluation")]


def csj_id(config: Config, catalog: Stage) -> list[Stage]:
    """CSJ-ID: text and LightGCN embeddings through one RQ-VAE, a decoder-only model generates the codes."""
    semantic = semantic_stage(config, catalog)
    graph = graph_stage(config, catalog)
    collaborative = lightgcn_stage(config, graph, partition_stage(config, graph))
    identifiers = identifier_stage(config, {"semantic": semantic, "collaborative": collaborative})
    generated = _gpt(config, catalog, identifiers)
    return [semantic, graph, collaborative, identifiers, *generated]


def semantic_id(config: Config, catalog: Stage) -> list[Stage]:
    """CSJ-ID's baseline: the same with codes of the text alone, as TIGER makes them."""
    semantic = semantic_stage(config, catalog)
    identifiers = identifier_stage(config, {"semantic": semantic})
    return [semantic, identifiers, *_gpt(config, catalog, identifiers)]


def _gpt(config: Config, catalog: Stage, identifiers: Stage) -> list[Stage]:
    generator = gpt_stage(config, catalog, identifiers)
    inputs = {"catalog": catalog, "identifiers": identifiers, "generator": generator}
    return [generator, evaluation_stage(config, "gpt", inputs, "evaluation")]


def sasrec(config: Config, catalog: Stage) -> list[Stage]:
    """SASRec as the main model, with the similarity of the `sasrec` section."""
    return reference(config, catalog, f"sasrec_{config.sasrec.similarity}", main=True)


def hstu(config: Config, catalog: Stage) -> list[Stage]:
    """HSTU as the main model."""
    return reference(config, catalog, "hstu", main=True)


def popularity(config: Config, catalog: Stage) -> list[Stage]:
    """Popularity as the main model."""
    return reference(config, catalog, "popularity", main=True)


def reference(config: Config, catalog: Stage, name: str, main: bool = False) -> list[Stage]:
    """A reference in the same harness: train (if there is anything to train) and evaluate."""
    label = "evaluation" if main else f"evaluation {name}"
    if name == "popularity":
        return [evaluation_stage(config, name, {"catalog": catalog}, label)]
    if name == "stage_one":
        semantic = semantic_stage(config, catalog)
        fused = fusion_stage(config, catalog, semantic)
        return [evaluation_stage(config, "fusion", {"catalog": catalog, "semantic": semantic, "fusion": fused}, label)]
    if name == "hstu":
        trained = hstu_stage(config, catalog)
        return [trained, evaluation_stage(config, name, {"catalog": catalog, "hstu": trained}, label)]
    trained = sasrec_stage(config, catalog, name.removeprefix("sasrec_"))
    return [trained, evaluation_stage(config, name, {"catalog": catalog, "sasrec": trained}, label)]


def embed(config: Config, catalog: Stage) -> list[Stage]:
    """Item embeddings and nothing else: what a full catalog's text costs is paid once, before any training."""
    return [semantic_stage(config, catalog)]


def lightgcn(config: Config, catalog: Stage) -> list[Stage]:
    """LightGCN embeddings of users and items, with the model's own Recall and NDCG."""
    graph = graph_stage(config, catalog)
    trained = lightgcn_stage(config, graph, partition_stage(config, graph))
    return [graph, trained, rank_count_stage(config, trained)]


METHODS = {
    "prorec": prorec,
    "csj_id": csj_id,
    "semantic_id": semantic_id,
    "sasrec": sasrec,
    "hstu": hstu,
    "popularity": popularity,
    "embed": embed,
    "lightgcn": lightgcn,
}


def build_stages(config: Config) -> list[Stage]:
    """All stages of a run, references included, inputs first."""
    catalog = catalog_stage(config)
    stages = [catalog, *METHODS[config.method](config, catalog)]
    for name in config.active_references:
        stages += reference(config, catalog, name)
    return stages


def collect_metrics(config: Config, run: RunFolder) -> dict:
    """Metrics of the main model and of every reference, from the run's evaluation artifacts."""
    if config.method in WITHOUT_EVALUATION:
        return {"method": config.method, "embeddings": read_json(run.artifact("semantic") / "report.json")}
    return {
        "method": config.method,
        "main": read_json(run.artifact("evaluation") / "metrics.json"),
        "references": {
            name: read_json(run.artifact(f"evaluation {name}") / "metrics.json") for name in config.active_references
        },
    }
