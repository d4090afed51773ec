"""The losses of a tile of rows inside a kernel, and what of them counts."""
