"""Baton: disaggregated LLM serving. Start at `docs/architecture.md`; the command is `baton`."""

__version__ = "0.1.0"
