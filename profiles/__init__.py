"""Machine profiles that ship with the planner, as data: measured ones with provenance, datasheet ones marked as such."""
