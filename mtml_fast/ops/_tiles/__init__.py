"""Rows packed by task and the outputs of tasks, cut into tiles: which of them a program of a Triton kernel has."""
