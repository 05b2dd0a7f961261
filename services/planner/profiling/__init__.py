"""From measured steps of an engine to the coefficients of a worker."""
