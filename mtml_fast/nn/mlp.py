"""mlp: an ordinary nn.Sequential of linear layers, batch norms and activations, and how such a model is read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mtml_fast.ops._route import has_hooks

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    *,
    activation: str = "relu",
    norm: str | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """An nn.Sequential of nn.Linear, optionally nn.BatchNorm1d, and activations.

    Args:
        in_features: D.
        hidden: the widths of the hidden layers; none gives a linear model.
        out_features: C.
        activation: relu, tanh, gelu, silu, elu, leaky_relu, sigmoid, softplus or identity.
        norm: "batch" puts a batch norm between every hidden layer and its activation; `None` none.
        bias: whether the linear layers have one.

    Raises:
        ValueError: naming the argument, what it must be and what it was.

    Example:
        >>> mlp(784, (64, 32), 5, norm="batch")[0]
        Linear(in_features=784, out_features=64, bias=True)
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if norm not in (None, "batch"):
        raise ValueError(f"norm must be None or 'batch', got {norm!r}")
    widths = [in_features, *hidden, out_features]
    for name, width in (("in_features", in_features), ("out_features", out_features), *(("hidden", h) for h in hidden)):
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"{name} must be a positive integer, got {width!r}")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if norm == "batch":
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


@dataclass(frozen=True)
class MLPForm:
    """What `mlp_adapt` needs to know of a model: its parameters in order, and the options they stand for."""

    names: list[str]
    params: list[Tensor]
    activation: str
    bias: bool
    norm: bool
    norm_eps: float
    flatten: bool  # whether rows may have any shape


def mlp_form(model: nn.Module) -> MLPForm | str:
    """A model read as an MLP, or in a few words why it is none."""
    if isinstance(model, nn.Linear):
        leaves = [("", model)]
    elif type(model) is nn.Sequential:
        leaves = list(_leaves(model))
    else:
        return f"{type(model).__name__} is no nn.Sequential"
    first = leaves[0][1] if leaves else None
    flatten = type(first) is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1)
    leaves = leaves[flatten:]
    linears = [i for i, (_, m) in enumerate(leaves) if type(m) is nn.Linear]
    if not linears or linears[0] != 0 or linears[-1] != len(leaves) - 1:
        return "it does not start and end with nn.Linear"
    between = [leaves[i + 1 : j] for i, j in itertools.pairwise(linears)]
    norms = [block[0][1] if block and type(block[0][1]) is nn.BatchNorm1d else None for block in between]
    rest = [block[1:] if norm is not None else block for block, norm in zip(between, norms, strict=True)]
    if any(len(block) != 1 for block in rest):
        return "it has layers besides nn.Linear, nn.BatchNorm1d and one activation"
    activations = [activation_name(block[0][1]) for block in rest]
    if None in activations:
        return f"{type(rest[activations.index(None)][0][1]).__name__} is no activation that mlp_adapt knows"
    if len({*activations}) > 1:
        return "its layers have different activations"
    if len({norm is None for norm in norms}) > 1 or len({norm.eps for norm in norms if norm is not None}) > 1:
        return "some of its layers have a batch norm and others have another or none"
    if any(norm is not None and not norm.affine for norm in norms):
        return "its batch norm has no gain and shift"
    modules = [m for _, m in leaves]
    biases = {modules[i].bias is None for i in linears}
    if len(biases) > 1:
        return "some of its layers have a bias and others none"
    if any(has_hooks(m) or hasattr(m, "parametrizations") for m in model.modules()):
        return "it has hooks or parametrizations"
    named = [
        (f"{name}.{key}" if name else key, parameter)
        for name, module in leaves
        for key, parameter in module.named_parameters(recurse=False)
    ]
    if len({id(parameter) for _, parameter in named}) < len(named):
        return "its layers share parameters"
    norm = next((n for n in norms if n is not None), None)
    return MLPForm(
        names=[name for name, _ in named],
        params=[parameter for _, parameter in named],
        activation=activations[0] if activations else "identity",
        bias=biases == {False},
        norm=norm is not None,
        norm_eps=norm.eps if norm is not None else 1e-5,
        flatten=flatten,
    )


def _leaves(model: nn.Sequential, prefix: str = ""):
    # named_children names a module that stands there twice only once
    names = {id(child): name for name, child in model.named_children()}
    for child in model:
        name = f"{prefix}{names[id(child)]}"
        if type(child) is nn.Sequential:
            yield from _leaves(child, f"{name}.")
        else:
            yield name, child


def activation_name(module: nn.Module) -> str | None:
    """The name of an activation with its usual constants."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind:
            own, usual = vars(module), vars(kind())
            same = all(own[k] == usual[k] for k in ("alpha", "negative_slope", "beta", "threshold") if k in usual)
            return name if same else None
    return None
