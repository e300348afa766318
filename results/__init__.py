"""Committed results, shipped with the package: claims (JSON) and records (JSON lines, gzip)."""
