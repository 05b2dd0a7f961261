"""What a model costs to run: parameters, bytes, FLOPs, roofline. Used by `baton model info`."""
