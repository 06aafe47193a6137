"""Published results, run again: one folder a paper (replications/README.md)."""
