"""When operands are cast to float8, by which kernel, and how casts are reused."""
