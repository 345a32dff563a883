"""What a run reads: text as tokens, and initial weights."""
