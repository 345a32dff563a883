"""What is written for keeps: every byte and name goes through one class, and so can be made to fail in tests."""
