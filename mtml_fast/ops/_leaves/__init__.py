"""Lists of leaves [T, ...] inside one kernel: what the Triton kernels of the operators over them share."""
