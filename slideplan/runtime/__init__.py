"""Executes a plan: lanes, buffers, units, optimizer, data, and the probes that measure a machine."""
