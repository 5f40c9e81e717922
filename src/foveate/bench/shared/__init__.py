"""What several benchmarks use: results, models of random weights, dense layers, other processes beside them."""
