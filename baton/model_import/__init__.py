"""Turns a GGUF file into a Hugging Face model folder. Used by `baton model import`."""
