"""Plan, simulate and run full-parameter LLM fine-tuning on one GPU that is too small for it."""

__version__ = "0.11.0"
