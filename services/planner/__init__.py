"""How many workers of which size: what a deployment needs, before it runs and while it does."""
