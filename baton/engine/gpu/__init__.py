"""The engine on NVIDIA GPUs: Triton kernels, CUDA graphs, steps launched ahead."""
