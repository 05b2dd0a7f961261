"""The page at /ui: chat, the cluster as it is, time lines of requests."""
