"""The declared series as live Prometheus metrics."""
