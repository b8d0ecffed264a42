"""The Containerfile, as far as it can be checked without building it, and what an installed package brings along."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "Containerfile"
SECRET = re.compile(r"(?i)(token|password|secret|access_?key)\s*=\s*(?!token\b)\S+")


@pytest.fixture(scope="module")
def steps() -> list[dict]:
    with open(FILE, "rb") as file:
        return [step for step in DockerfileParser(fileobj=file).structure if step["instruction"] != "COMMENT"]


def values(steps: list[dict], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def test_the_base_is_pinned_and_of_the_supported_python(steps):
    (base,) = values(steps, "FROM")
    assert re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", base)


def test_the_user_is_not_root(steps):
    assert values(steps, "USER") == ["1000:1000"]
    after = [step["instruction"] for step in steps]
    assert not {"RUN", "COPY", "ADD"} & set(after[after.index("USER") :])
    assert any("useradd" in value and "--uid 1000" in value for value in values(steps, "RUN"))


def test_what_is_copied_exists_and_is_let_through(steps):
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert ignore[0] == "*"
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    sources = [word.rstrip("/") for value in values(steps, "COPY") for word in value.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
    assert set(sources) == let_through
    assert values(steps, "ADD") == []


def test_token_authentication_is_on_and_no_secret_inside(steps):
    (environment,) = values(steps, "ENV")
    assert "RAY_AUTH_MODE=token" in environment
    text = FILE.read_text() + (ROOT / "cluster" / "object-store.env").read_text()
    assert not SECRET.findall(text)
    assert SECRET.findall("RAY_AUTH_TOKEN=abc AWS_SECRET_ACCESS_KEY=x")


def test_the_locks_are_what_is_installed(steps):
    installs = " ".join(values(steps, "RUN"))
    for lock in ("requirements/cpu-bootstrap.lock", "requirements/cpu.lock"):
        assert lock in installs
        assert (ROOT / lock).is_file()


def test_the_object_store_example_is_an_environment_file():
    lines = (ROOT / "cluster" / "object-store.env").read_text().splitlines()
    lines = [line.lstrip("# ") if "=" in line and " " not in line.lstrip("# ") else line for line in lines]
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#") and "=" in line)
    assert settings["GENREC_STORE"].startswith("s3://")
    assert {"AWS_REGION", "AWS_ENDPOINT_URL", "AWS_SHARED_CREDENTIALS_FILE"} <= set(settings)


@pytest.mark.slow
def test_a_wheel_brings_the_files_of_cluster(tmp_path):
    """An installed genrec renders without its source folder."""
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            capture_output=True, text=True, check=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        brought = {name.split("/share/genrec_dist/")[1] for name in archive.namelist() if "/share/genrec_dist/" in name}
        assert "launcher/submit.py" in archive.namelist()
    files = {path.relative_to(source).as_posix() for path in (source / "cluster").rglob("*") if path.is_file()}
    assert brought == files
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", tmp_path / "venv"], check=True
    )
    python = tmp_path / "venv" / "bin" / "python"
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True)
    # Else pip removes the project from this environment to install it there.
    apart = ["--no-deps", "--ignore-installed", "--prefix", prefix.stdout.strip()]
    subprocess.run([*pip, "install", *apart, wheel], check=True)
    done = subprocess.run(
        [python, "-m", "launcher.cli", "submit", ROOT / "configs" / "quickstart.yaml", "--store", "/shared/s", "--runs",
         "/shared/r", "--render", "kuberay", "--out", tmp_path / "out"],
        cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": sysconfig.get_path("purelib"), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "rayjob.yaml").is_file()
