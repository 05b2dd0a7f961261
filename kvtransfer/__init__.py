"""Moving KV blocks between workers: leases, one-sided reads, and the transports that do them.

Imports `baton.core` only; knows nothing of engines, gRPC or requests beyond their ids.
"""
