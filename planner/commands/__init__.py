"""The commands of `planner`, one file each, and the options that they share."""
