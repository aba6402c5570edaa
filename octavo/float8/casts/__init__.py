"""Who casts a tensor to float8, when, and how casts are reused."""
