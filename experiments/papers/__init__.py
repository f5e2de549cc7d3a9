"""The papers' figures and claims, and what happens where their assumptions end."""
