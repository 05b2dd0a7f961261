"""When a request runs: objectives, fair queueing between tenants, early refusal."""
