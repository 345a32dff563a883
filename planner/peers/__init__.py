"""Other systems in the project's language, priced beside its own plan."""
