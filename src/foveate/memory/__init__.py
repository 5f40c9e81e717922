"""Memory: blocks for planes on huge pages, how much memory is free, and giving freed memory back."""
