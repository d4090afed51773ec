"""The arguments that heads and heads_loss share."""

from __future__ import annotations

from mtml_fast.ops import _check
from mtml_fast.ops.heads.reference import ACTIVATIONS


def checked_heads(x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation) -> tuple:
    """The arguments of a batch of heads, checked."""
    _check.floating("x", x)
    _check.shape("x", x, ("R", None), ("D", None))
    _check.offsets("offsets", offsets, x, empty_tasks=True)
    tasks, features = offsets.numel() - 1, x.shape[1]
    _check.choice("activation", activation, tuple(ACTIVATIONS))
    if hidden_weight is not None:
        _check.floating("hidden_weight", hidden_weight, like=x, like_name="x")
        _check.shape("hidden_weight", hidden_weight, ("T", tasks), ("H", None), ("D", features))
        features = hidden_weight.shape[1]
    if hidden_bias is not None:
        if hidden_weight is None:
            raise ValueError(f"hidden_bias must be None without hidden_weight, got shape {list(hidden_bias.shape)}")
        _check.floating("hidden_bias", hidden_bias, like=x, like_name="x")
        _check.shape("hidden_bias", hidden_bias, ("T", tasks), ("H", features))
    _check.floating("weight", weight, like=x, like_name="x")
    _check.shape("weight", weight, ("sum of C_t", None), ("D" if hidden_weight is None else "H", features))
    if out_offsets is not None:
        _check.offsets("out_offsets", out_offsets, weight)
        _check.shape("out_offsets", out_offsets, ("T + 1", tasks + 1))
    elif tasks and weight.shape[0] % tasks:
        raise ValueError(
            f"weight must have equally many rows for each of the {tasks} tasks (or out_offsets must be given), "
            f"got {weight.shape[0]}"
        )
    if bias is not None:
        _check.floating("bias", bias, like=x, like_name="x")
        _check.shape("bias", bias, ("sum of C_t", weight.shape[0]))
    return x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation
