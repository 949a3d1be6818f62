"""Versions computed from stored versions."""
