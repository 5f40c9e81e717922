"""What quantizing takes beside other libraries: time, processor time and memory on SmolLM2-135M."""
