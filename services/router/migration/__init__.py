"""Running requests that move to another worker."""
