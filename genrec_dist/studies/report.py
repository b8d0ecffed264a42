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
from genrec_dist.studies.run_data import RunData

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    results.comparison,
    results.metrics_section,
    results.ranks_section,
    results.beam_section,
    process.training_section,
    process.identifiers_section,
    process.embeddings_section,
    process.data_section,
    process.stages_section,
    process.settings_section,
)


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
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        name=run.path.name,
        protocol=results.protocol(data),
        tiles=results.headline_tiles(data),
        finished=data.main is not None or data.config.method in WITHOUT_EVALUATION,
        sections=sections,
        started=data.provenance.get("started", ""),
        version=__version__,
    )
    path = run.path / "report.html"
    write_atomic(path, page.encode("utf-8"))
    return path
