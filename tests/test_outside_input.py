"""What comes from outside: YAML within limits, endless lines and archives, secrets that stay out of what is written."""

from __future__ import annotations

import gzip

import pytest

from genrec_dist.catalog import amazon
from genrec_dist.config import load_config
from genrec_dist.errors import ConfigError, DataError
from genrec_dist.redaction import HIDDEN, redact_command, redact_text
from genrec_dist.safe_yaml import MAX_DEPTH, parse_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(6)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "a: &a [*a]", "x: " + "y" * (1 << 20), "a: !!python/none x"],
)
def test_yaml_beyond_its_limits_is_a_configuration_error(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(file)


def test_plain_yaml_and_harmless_aliases_pass():
    assert parse_yaml("a: &x [1, 2]\nb: *x", "here") == {"a": [1, 2], "b": [1, 2]}


def test_an_archive_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(amazon, "FREE_BYTES", 1 << 16)
    file = tmp_path / "reviews.json.gz"
    file.write_bytes(gzip.compress(b"{}\n" * (1 << 22)))
    with pytest.raises(DataError, match="expands"):
        list(amazon._lines(file))


def test_an_endless_line_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(amazon, "MAX_LINE", 64)
    file = tmp_path / "reviews.json"
    file.write_bytes(b"{}\n" + b"x" * 1000 + b"\n{}\n")
    lines = list(amazon._lines(file))
    assert [line for line, _ in lines] == [1, 2, 3]
    assert [isinstance(found, amazon.BadRow) for _, found in lines] == [False, True, False]


def test_secrets_stay_out_of_command_lines():
    environment = {"RAY_AUTH_TOKEN": "0123456789abcdef", "SHORT_TOKEN": "abc"}
    command = [
        "genrec",
        "run",
        "--token",
        "one",
        "--api-key=two",
        "--set",
        "a.password=three",
        "0123456789abcdef",
        "abc",
    ]
    assert redact_command(command, environment) == [
        "genrec", "run", "--token", HIDDEN, f"--api-key={HIDDEN}", "--set", f"a.password={HIDDEN}", HIDDEN, "abc",
    ]  # fmt: skip
    for user in ("user:pw", "user:p@ss", "user:pa/ss"):
        assert redact_text(f"see https://{user}@host/x then", {}) == f"see https://{HIDDEN}@host/x then"
    for harmless in ("https://host/o/r@v1", "s3://b/x,mail=me@x.org"):
        assert redact_text(harmless, {}) == harmless
    assert redact_command(["--set", "fusion.dim=64"], {}) == ["--set", "fusion.dim=64"]
