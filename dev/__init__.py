"""Checks and measurements of a checkout; not part of the wheel."""
