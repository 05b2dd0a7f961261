"""Where a request runs, and what that is predicted to take."""
