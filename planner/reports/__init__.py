"""What the planner prints."""
