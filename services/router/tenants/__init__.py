"""Who asks, and how much they may: API keys and quotas."""
