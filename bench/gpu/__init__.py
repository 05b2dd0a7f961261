"""Benchmarks on NVIDIA GPUs: kernels and engine beside peers and the card's own limits."""
