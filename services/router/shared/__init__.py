"""What several copies of the router know together: quotas, API keys, recent placements."""
