"""What prefill and decode workers share: engine loop, session server, leases, health, drain."""
