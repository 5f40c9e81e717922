"""A simulated batched server on recorded traces: what precision that moves is worth under load, and what is best."""
