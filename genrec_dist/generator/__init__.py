"""Stage II models: codes of the next item."""
