"""Content-addressed, checksummed artifacts: manifest, store, Zarr arrays, failed-row ledger."""
