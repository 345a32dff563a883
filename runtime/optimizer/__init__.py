"""AdamW on split master weights and its moments."""
