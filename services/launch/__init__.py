"""The whole system on one machine: router, prefill and decode workers, with or without Ray."""
