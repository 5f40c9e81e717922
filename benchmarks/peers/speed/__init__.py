"""Speed beside other libraries: one linear layer, and a whole model token by token."""
