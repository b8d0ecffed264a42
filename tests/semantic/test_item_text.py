"""Item text: segments with missing fields left out, templates checked before anything runs."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from genrec_dist.config import SemanticConfig
from genrec_dist.errors import ConfigError
from genrec_dist.semantic.text import item_text, parse_template

TEMPLATE = SemanticConfig().template


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            ("Lip Balm", "Acme", ["Beauty > Lips", "Gifts"], "Soft."),
            "title: Lip Balm; brand: Acme; categories: Beauty > Lips, Gifts; description: Soft.",
        ),
        (("Lip Balm", None, None, None), "title: Lip Balm"),
        ((None, "Acme", [], ""), "brand: Acme"),
        (("  two\n lines ", "   ", ["", " A "], None), "title: two lines; categories: A"),
        (("{brand}; x", "{title}", None, None), "title: {brand}; x; brand: {title}"),
        ((None, None, None, None), ""),
        (("", " ", [" "], "\t"), ""),
    ],
)
def test_missing_fields_leave_their_segment_out(fields, text):
    assert item_text(TEMPLATE, *fields) == text


@pytest.mark.parametrize(
    ("template", "full", "without_brand"),
    [
        ("{title}", "T", "T"),
        ("{title} by {brand}; {brand}", "T by B; B", ""),
        ("a product; {title}; {brand}", "a product; T; B", "a product; T"),
        ("{{x}}: {title}", "{x}: T", "{x}: T"),
    ],
)
def test_other_templates(template, full, without_brand):
    assert item_text(template, "T", "B", None, None) == full
    assert item_text(template, "T", None, None, None) == without_brand


def test_literal_text_alone_is_no_text():
    assert item_text("a product; {title}", None, "B", None, None) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{titel}", "nearest: {title}"),
        ("{title.__class__}", r"\{title.__class__\}"),
        ("{title[0]}", r"\{title\[0\]\}"),
        ("{}", r"\{\}"),
        ("{title!r}", "conversion or format"),
        ("{title:>9}", "conversion or format"),
        ("{title", "expected '}'"),
        ("title}", "Single '}'"),
        ("no field", "no placeholder"),
        ("", "no placeholder"),
    ],
)
def test_bad_templates_are_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        parse_template(template)


@pytest.mark.data
def test_real_items_have_text_exactly_when_they_have_a_field(real_data):
    for name in ("beauty", "toys"):
        columns = ["title", "brand", "categories", "description"]
        table = pq.read_table(real_data / name / "items.parquet", columns=columns)
        for row in table.to_pylist():
            text = item_text(TEMPLATE, **row)
            assert text.startswith("title: ") == bool(row["title"] and row["title"].strip())
            assert bool(text) == any(row.values())
            assert "None" not in text.replace(row["title"] or "", "").replace(row["brand"] or "", "")
