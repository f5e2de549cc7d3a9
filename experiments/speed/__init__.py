"""Seconds and bytes: of a vote, of a step, and of a network."""
