"""Sequence backbones and PRORec Stage I fusion."""
