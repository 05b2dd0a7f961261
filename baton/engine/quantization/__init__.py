"""Weights and KV in fewer bits: values, rounding, checkpoint format, and the command's work."""
