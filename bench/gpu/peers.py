"""What vLLM and gpt-fast reached on the same kind of card, for lines beside ours.

Measured once on an NVIDIA H200 (driver 580, torch 2.11.0+cu130, triton 3.6.0; copy 4,285 GB/s,
bf16 matmul 797 TFLOP/s in the same hour), not in the run that prints them: compare shares of the
ceilings rather than the figures. vLLM 0.26.0: Llama-3.1-8B shape, bf16, FlashAttention-3,
torch.compile and full CUDA graphs, prefix caching off. gpt-fast: its own measure.
"""

from __future__ import annotations

PEER_COPY_BYTES_PER_S = 4285e9
PEER_MATMUL_FLOPS_PER_S = 797e12

VLLM_DECODE_TOKENS_PER_S = {
    (1, 128): 209.2,
    (1, 8192): 197.0,
    (1, 32768): 172.1,
    (8, 1024): 1542.0,
    (32, 1024): 5108.0,
    (64, 1024): 8428.0,
    (128, 1024): 12129.0,
    (256, 1024): 14485.0,
    (32, 4096): 3468.0,
    (64, 4096): 4720.0,
}
"""(batch size, context tokens) -> tokens/s of the whole batch, Llama-3.1-8B."""

VLLM_PREFILL_TOKENS_PER_S = {
    (1, 512): 27154.0,
    (1, 1024): 36595.0,
    (1, 2048): 39878.0,
    (1, 8192): 38779.0,
    (4, 2048): 42609.0,
    (8, 8192): 38289.0,
    (1, 30000): 28072.0,
}
"""(prompts, tokens each) -> prompt tokens/s, Llama-3.1-8B."""

GPT_FAST_DECODE_TOKENS_PER_S = {
    ("llama-3.1-8b", "bf16"): 190.9,
    ("llama-3.1-8b", "int8"): 150.0,
    ("llama-2-7b", "bf16"): 200.7,
}
"""Batch 1, average over whole generations of 200 tokens."""
