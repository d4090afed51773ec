"""Linear layers of tasks over rows packed by task, of any width: for the Triton kernels of heads and heads_loss."""
