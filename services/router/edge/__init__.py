"""The front doors: HTTP and gRPC servers, request parsing, prompts to tokens."""
