"""Embeddings -> item codes, trie, quality."""
