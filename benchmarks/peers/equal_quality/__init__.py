"""Whole decoding beside llama.cpp at equal quality: SmolLM2-135M, its text, our maps of equal KL, and the plot."""
