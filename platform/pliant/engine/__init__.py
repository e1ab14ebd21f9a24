"""Runs any recipe: steps, ranks, precision, checkpoints. Knows no method and no network by name."""
