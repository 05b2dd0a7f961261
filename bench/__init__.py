"""Benchmarks of the repository: ours beside a peer or a limit, in one run, stored as JSON."""
