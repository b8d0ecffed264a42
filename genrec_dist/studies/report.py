"""The HTML report of a run: one file, no scripts, nothing fetched.

Reads the run folder and its artifacts (see run_data.py); writes `report.html` and the t-SNE cache in the run folder.
Whatever the run does not have is left out. It computes no result: every number was measured by a stage.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from genrec_dist import __version__
from genrec_dist.artifacts.files import write_atomic
from genrec_dist.config import WITHOUT_EVALUATION
from genrec_dist.runs import RunFolder
from genrec_dist.studies import process, results
from genrec_dist.studies.identifier_section import identifiers_section
from genrec_dist.studies.run_data import RunData

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    results.comparison,
    results.metrics_section,
    results.ranks_section,
    results.beam_section,
    process.training_section,
    identifiers_section,
    process.embeddings_section,
    process.data_section,
    process.stages_section,
    process.settings_section,
)


def render(template: str, **values: object) -> str:
    """One of the project's pages, with every value escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **values)


def write_report(run: RunFolder) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run: a run folder with at least its config.yaml.

    Returns:
        Path of `report.html`.

    Raises:
        ConfigError: the run's configuration is not valid.
        ArtifactError: an embedding artifact is unfinished or damaged.
    """
    data = RunData(run)
    sections = [section for build in SECTIONS if (section := build(data)) is not None]
    page = render(
        "report.html",
        kind="run report",
        name=run.path.name,
        protocol=results.protocol(data),
        tiles=results.headline_tiles(data),
        finished=data.main is not None or data.config.method in WITHOUT_EVALUATION,
        sections=sections,
        started=data.provenance.get("started", ""),
    )
    path = run.path / "report.html"
    write_atomic(path, page.encode("utf-8"))
    return path
