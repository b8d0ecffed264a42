"""Raw interactions and metadata -> items, sequences, statistics, ledger."""
