"""A compiled library that decodes a whole token on the CPU, and what builds and loads it."""
