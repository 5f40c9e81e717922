"""What computes answers: continuous batching with rows of different precision, and who decides between its steps."""
