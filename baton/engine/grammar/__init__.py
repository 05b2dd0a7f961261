"""What an output must look like, as a set of possible next tokens."""
