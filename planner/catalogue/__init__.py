"""Known models and machines."""
