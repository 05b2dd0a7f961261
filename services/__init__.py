"""The processes of the platform, one package each; every package runs by `python -m`."""
