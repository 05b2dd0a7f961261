"""Which worker holds which KV blocks."""
