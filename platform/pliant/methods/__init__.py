"""One file per paper. Each reads like its algorithm and knows nothing of ranks, precision or data."""
