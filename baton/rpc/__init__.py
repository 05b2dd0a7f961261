"""Protobuf and gRPC: generated stubs, conversion to and from `baton.core`, channels."""
