"""The documentation names only what exists: links, commands, options, configuration keys.

Reads every tracked or new Markdown file; of fenced code, only blocks that show a command or YAML are parsed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main
import yaml

from genrec_dist.config import build_config, known_keys, load_config
from genrec_dist.studies.scaling.sweep_file import load_sweep
from launcher.cli import app

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECTIONS = {name.split(".")[0] for name in known_keys() if "." in name}
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]\w*)+(?![\w/])")
FILE_ENDINGS = {"py", "json", "jsonl", "md", "html", "yaml", "zarr", "parquet", "safetensors", "toml", "lock", "log"}


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore; a source archive without git has no such list."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def pages() -> list[Path]:
    """All Markdown files of the project."""
    folders = [ROOT, *(ROOT / name for name in ("docs", "cluster", "requirements", "benchmarks", "configs", "tests"))]
    found = set(ROOT.glob("*.md")).union(*(folder.rglob("*.md") for folder in folders[1:]))
    return sorted(found)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_of(text: str) -> list[str]:
    """Code blocks and code spans."""
    return [body for _, body in FENCE.findall(text)] + SPAN.findall(FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def genrec_calls(text: str) -> list[list[str]]:
    """Words after `genrec` in every shown command."""
    calls = []
    for code in code_of(text):
        for line in code.replace("\\\n", " ").splitlines():
            if match := re.match(r"\s*(?:\S*/)?genrec(?:\s+(.*))?$", line):
                calls.append(shlex.split((match[1] or "").replace("...", ""), comments=True))
    return calls


def command_of(words: list[str]):
    """The click command that the words begin with, and the words that are left."""
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return None, words
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_of(command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_relative_links_resolve(page: Path):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{link} (no such heading)")
    assert not broken


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_and_their_options_exist(page: Path):
    wrong = []
    for words in genrec_calls(page.read_text(encoding="utf-8")):
        if words and words[0] == "COMMAND":  # the placeholder of `genrec COMMAND --help`
            continue
        command, rest = command_of(words)
        if command is None:
            wrong.append(f"no command: genrec {' '.join(words)}")
            continue
        unknown = {word.split("=")[0] for word in rest if word.startswith("-")} - options_of(command)
        wrong += [f"no option {option}: genrec {' '.join(words)}" for option in sorted(unknown)]
    assert not wrong


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_shown_configurations_exist_and_take_the_shown_settings(page: Path):
    for words in genrec_calls(page.read_text(encoding="utf-8")):
        settings = [b for a, b in pairwise(words) if a == "--set" and re.match(r"[a-z_.]+=[^=]", b)]
        for file in (word for word in words if re.match(r"configs/\S+\.yaml$", word)):
            if words[0] == "sweep":
                load_sweep(ROOT / file)
            else:
                load_config(ROOT / file, settings)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_named_configuration_keys_exist(page: Path):
    known = set(known_keys())
    unknown = set()
    for code in code_of(page.read_text(encoding="utf-8")):
        named = {key for key in KEY.findall(code) if key.rsplit(".", 1)[-1] not in FILE_ENDINGS}
        unknown |= {key for key in named if key not in known}
    assert not unknown


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_shown_yaml_is_a_valid_part_of_a_configuration(page: Path):
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            build_config(yaml.safe_load(body), where=name_of(page))


def test_settings_in_comments_of_configurations_can_be_given_as_written():
    wrong = []
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        words = " ".join(line.strip().lstrip("# ") for line in lines if line.strip().startswith("#")).split()
        for before, word in pairwise(["", *words]):
            if KEY.match(word) and "=" in word:
                key = word.split("=")[0]
                wrong += [f"{file.name}: {word}"] * (before != "--set" or key not in known_keys())
    assert not wrong


def test_checks_find_what_is_wrong():
    text = (
        "Run `genrec rn x` or `genrec run c.yaml --sett a=1`, see `fusion.dims` and\n```\n$\ngenrec run c.yaml\n```\n"
    )
    calls = genrec_calls(text)
    assert ["run", "c.yaml"] in calls
    assert command_of(["rn", "x"])[0] is None
    assert "--sett" not in options_of(command_of(["run"])[0])
    assert KEY.findall("fusion.dims") == ["fusion.dims"]
    assert "fusion.dims" not in known_keys()
    assert KEY.findall("genrec_dist.catalog.describe and genrec_dist/pipeline.py") == []
    assert anchors("# Where we differ from the paper\n") == {"where-we-differ-from-the-paper"}


def test_every_page_of_docs_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {(ROOT / "docs" / link.split("#")[0]).resolve() for link in LINK.findall(index)}
    assert not {
        name_of(page) for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page not in listed
    }


def test_every_decision_is_listed_and_has_its_parts():
    folder = ROOT / "docs" / "decisions"
    listed = set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))
    records = {page.name: page.read_text(encoding="utf-8") for page in folder.glob("[0-9]*.md")}
    assert records
    assert set(records) == listed
    for name, text in records.items():
        assert text.startswith(f"# {name[:4]} "), name
        assert re.findall(r"^## (.+)$", text, re.M) == ["Context", "Decision", "Consequences"], name


def test_readme_begins_with_the_two_commands():
    head = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30]
    shown = {line.split("#")[0].strip() for line in head}
    assert {"make quickstart", "make test"} <= shown
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"quickstart", "test"} <= set(targets)


def test_the_command_line_page_describes_every_command():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    names = []
    for name, command in root.commands.items():
        names += [f"{name} {inner}" for inner in command.commands] if hasattr(command, "commands") else [name]
    assert not [name for name in names if f"genrec {name}" not in text]


def test_no_absolute_path_of_a_machine_in_any_file():
    pattern = re.compile(rb"(?<![\w.:/<>-])/(?:home|root|work|mnt|Users|private|scratch)/[\w.-]+")
    found = []
    for file in repository_files():
        data = file.read_bytes()
        if b"\0" in data[:4096]:  # not text
            continue
        found += [f"{name_of(file)}: {match.decode(errors='replace')}" for match in pattern.findall(data)]
    assert not found
