"""One file per feature."""
