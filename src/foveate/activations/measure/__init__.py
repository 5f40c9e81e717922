"""What a training step measures: sites, statistics, gradients, probes and audits."""
