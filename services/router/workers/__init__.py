"""The workers as the router sees them: who there is, one session with each, what they report."""
