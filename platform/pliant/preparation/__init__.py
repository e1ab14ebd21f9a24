"""Datasets made ready before any run: unpacked, packed into shards, split, verified. `pliant data` is its door."""
