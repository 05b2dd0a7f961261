"""What moving KV costs on this machine, piece by piece; put together by `bench.transfer`."""
