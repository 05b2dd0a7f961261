"""One process per rank of a tensor-parallel group, started and watched by rank 0."""
