"""Which policies are considered, what bounds them, and how the best is found."""
