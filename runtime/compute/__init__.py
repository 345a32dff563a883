"""Compute tasks: embedding, decoder layers and head on the slots that a task names."""
