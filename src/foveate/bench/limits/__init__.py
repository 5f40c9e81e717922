"""What the machine can do at most, which benchmarks compare with."""
