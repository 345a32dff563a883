"""What a machine can do, as measured or from datasheets, and how its lanes share bandwidth."""
