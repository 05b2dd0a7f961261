"""Blocks outside the pool: a bounded arena in host memory, and a directory below it."""
