"""The parts of `make gpu-check` that need the package: checks on a GPU, and timings there. See ../gpu_check.py."""
