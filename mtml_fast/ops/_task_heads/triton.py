"""The arguments that heads and heads_loss share, and what comes before the last layer: a hidden one, if there is one.

Its activation and the derivatives are torch's: they read what a layer has written, which is little beside the layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_fast.ops._ragged.triton import backward, forward, gradients
from mtml_fast.ops._route import ordinary_dispatch
from mtml_fast.ops._tiles.triton import Rows, equal_outputs, outputs_of
from mtml_fast.ops.heads.reference import ACTIVATIONS


class Heads:
    """The arguments that heads and heads_loss share, the hidden layer computed."""

    def __init__(self, x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation, packed=True):
        self.x, self.weight = x.contiguous(), weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.rows = Rows(offsets.contiguous(), offsets.shape[0] - 1, x.shape[0])
        self.outputs = outputs_of(self.rows, weight, out_offsets, packed)
        self.activation, self.hidden, self.h = activation, None, self.x
        given = dict(x=x, weight=weight, bias=bias, hidden_weight=hidden_weight, hidden_bias=hidden_bias)
        # by name, in the order of `needs`
        self.inputs = {name: t for name, t in given.items() if t is not None}
        if hidden_weight is not None:
            self.hidden = equal_outputs(self.rows, hidden_weight.shape[1])
            # [T * H, D]
            self.hidden_weight = hidden_weight.contiguous().flatten(0, 1)
            b = None if hidden_bias is None else hidden_bias.contiguous()
            self.a = forward(self.rows, self.hidden, [(self.x, self.hidden_weight)], b, self.new_hidden())
            self.h = ACTIVATIONS[activation](self.a)

    def new_hidden(self) -> Tensor:
        return self.x.new_empty(self.rows.count, self.hidden.width)

    def named(self, flags: Sequence[bool]) -> dict[str, bool]:
        """Flags of the inputs by their names; of those that are not there, false."""
        of_inputs = dict(zip(self.inputs, flags, strict=True))
        return dict.fromkeys(("bias", "hidden_weight", "hidden_bias"), False) | of_inputs

    def before(self, d: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
        """Gradients of what comes before the last layer, for the cotangent d of its rows."""
        found = {"x": d}
        if self.hidden is not None:
            da = activated_backward(self.activation, self.a, d)
            needs = need["hidden_weight"], need["hidden_bias"]
            found["hidden_weight"], found["hidden_bias"] = gradients(self.rows, self.hidden, [(da, self.x)], needs)
            if need["x"]:
                found["x"] = backward(self.rows, self.hidden, [(da, self.hidden_weight)], self.x)
        return found

    def results(self, found: dict[str, Tensor], need: dict[str, bool]) -> list[Tensor]:
        """The gradients that are needed, in order, in the shapes of their inputs."""
        return [found[name].view(t.shape) for name, t in self.inputs.items() if need[name]]


def activated_backward(activation: str, a: Tensor, e: Tensor) -> Tensor:
    """act'(a) e"""
    with ordinary_dispatch():
        return torch.func.vjp(ACTIVATIONS[activation], a)[1](e)[0]


def activated_reverse(activation: str, a: Tensor, e: Tensor, a1: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of da = act'(a) e, for a cotangent a1 of it and s of h = act(a): da, act'(a) a1 and act'(a) s + act''(a) e a1."""
    with ordinary_dispatch():

        def of_both(a, e):
            h, pullback = torch.func.vjp(ACTIVATIONS[activation], a)
            return h, pullback(e)[0]

        (_, da), pullback = torch.func.vjp(of_both, a, e)
        r, h1 = pullback((s, a1))
    return da, h1, r
