"""Triton kernels, one operation a file: torch reference, tile choice, kernel, launcher.

Imports nothing of ours, so that each file can be read, tested and timed by itself.
"""

# transformers takes a package of this name for Hugging Face's own and reads its version.
__version__ = "0"
