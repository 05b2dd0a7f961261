"""What quantisation costs in quality, on the real model."""
