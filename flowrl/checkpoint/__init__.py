"""Atomic, verified, pickle-free checkpoints, and the signals that ask for one. Start at ``store``."""
