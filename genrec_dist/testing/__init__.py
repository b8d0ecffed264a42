"""Tiny models and fault injection for tests, also of downstream users."""
