"""Committed stages by key: written under a temporary name, renamed last, recorded, verified, merged."""
