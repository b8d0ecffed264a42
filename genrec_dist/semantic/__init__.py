"""Item text -> embeddings in Zarr."""
