"""What a training step measures: statistics, gradients, probes and audits."""
