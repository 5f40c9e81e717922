"""What models of other libraries need: forwards around a weight, folded norms, and their own way of saving."""
