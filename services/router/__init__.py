"""The router: tokenizes, places, follows and answers requests. Runs without torch."""
