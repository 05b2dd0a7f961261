"""One request from its arrival to its last token: attempts, retries, text, what remains of it."""
