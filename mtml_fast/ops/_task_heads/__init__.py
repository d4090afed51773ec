"""The heads of all tasks, as the Triton kernels of heads and heads_loss take them."""
