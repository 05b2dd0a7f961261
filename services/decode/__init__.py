"""The decode worker: reads a prompt's KV from a prefill worker and generates."""
