"""Reference recommenders in the same harness."""
