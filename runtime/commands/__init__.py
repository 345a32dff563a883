"""The commands of `runtime`, and what they share."""
