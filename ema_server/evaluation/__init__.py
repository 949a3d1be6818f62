"""Leases, validations, reported metrics, and the evaluator process."""
