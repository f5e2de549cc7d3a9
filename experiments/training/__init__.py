"""Training on real data with votes, and how to choose its settings."""
