"""The inference engine. Control (scheduler, block pool) is torch-free; the runner is not."""
