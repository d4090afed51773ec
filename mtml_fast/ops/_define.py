"""define_op: one way to register a differentiable operator.

The schema lives in Python. The reference is the implementation for every device without a native one, and its vjp is
the implementation of the backward operator `<name>_backward`, which is an operator too: so C++ may serve either, and
both have autograd. The reverse of the backward operator may be a third one, `<name>_double_backward`. A missing
derivative raises; it never becomes first order in silence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtml_fast.ops import _cuda, _triton
from mtml_fast.ops._library import LIB, warn_without_cuda
from mtml_fast.ops._route import has_kernel, needs_reference, ordinary_dispatch

# every operator by name: what the environment report and the battery walk through
OPERATORS: dict[str, Operator] = {}


class Operator:
    """A registered operator; calling it routes to the dispatcher, or to the reference where only that is right."""

    def __init__(self, name, reference, arguments, differentiable, refuse, double_backward):
        self.name: str = name
        self.reference: Callable = reference
        # (type, name) of each argument
        self.arguments: list[tuple[str, str]] = arguments
        self.differentiable: tuple[str, ...] = tuple(differentiable)
        # why there is no second derivative; None where there is one
        self.refuse: str | None = refuse
        # whether Triton kernels serve CUDA devices
        self.triton = False
        # why the CUDA library does not, though it has kernels
        self.refused: str | None = None
        # the reference as kernels, by the operator's name and its backward operators'
        self.kernels: dict[str, Callable] = {}
        self._known: dict[torch.device, bool] = {}
        namespace = torch.ops.mtml_fast
        self.forward = getattr(namespace, name).default
        self.backward = getattr(namespace, f"{name}_backward").default
        # without autograd of its own; None where the reference alone has the second derivative
        self.double_backward = getattr(namespace, f"{name}_double_backward").default if double_backward else None

    def __call__(self, *args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        # a compiler gets the operator, and cannot look into who serves it
        native = torch.compiler.is_compiling() or self.has_kernels(first.device)
        if needs_reference(native):
            with in_given_dtype(first):
                return self.reference(*args)
        return self.forward(*args)

    def served_by(self, device: str | torch.device) -> str:
        """Who serves forward and backward on a device: "native", "triton" or "reference"."""
        device = torch.device(device)
        if not self._native(device):
            return "reference"
        return "triton" if device.type == "cuda" and self.triton else "native"

    def has_kernels(self, device: torch.device) -> bool:
        """Whether it is not the reference that serves a device; of CUDA it is said why, once."""
        native = self._native(device)
        if not native and device.type == "cuda":
            warn_without_cuda()
        return native

    def _native(self, device: torch.device) -> bool:
        if device not in self._known:
            names = (self.name, f"{self.name}_backward")
            native = all(has_kernel(f"mtml_fast::{name}", device.type) for name in names)
            if device.type == "cuda":
                native = self._served_in_cuda(native, device)
            self._known[device] = native
        return self._known[device]

    def _served_in_cuda(self, native: bool, device: torch.device) -> bool:
        if not native:
            _triton.warn_of_missing(self.name)
        elif not self.triton and self.refused is None and (why := _cuda.refusal(device)):
            _cuda.warn_of_refusal(why)
            self._hand_over(why)
        return self.triton or (native and self.refused is None)

    def _hand_over(self, why: str) -> None:
        """The CUDA key to Triton or the reference: of all devices, as the dispatcher knows no single ones."""
        self.refused = why
        self.triton = _triton.register(self.name, LIB, override=True)
        for name, kernel in self.kernels.items():
            taken = self.triton and name in _triton.targets(self.name)
            if not taken and has_kernel(f"mtml_fast::{name}", "cuda"):
                _triton.replace(LIB, name, kernel)
        # what was known of other devices is over
        self._known.clear()


def define_op(
    name: str,
    schema: str,
    reference: Callable,
    *,
    fake: Callable,
    differentiable: Sequence[str],
    refuse: str | None = None,
    double_backward: bool = False,
) -> Operator:
    """Register operator `name` and its backward operator, and return it.

    The backward operator has the schema `(Tensor[] grad_outputs, <arguments>, bool[] needs) -> Tensor[]`: one cotangent
    for each output tensor; `needs` has one entry for each tensor of the differentiable arguments, in order; the result
    holds the gradients of exactly those that are needed.

    Args:
        schema: `(Tensor x, Tensor[] params, float? clip) -> Tensor`, all arguments positional, no defaults.
        reference: pure PyTorch with the schema's arguments, differentiable to any order.
        fake: the outputs' shapes and dtypes, with the schema's arguments.
        differentiable: names of the arguments with a gradient.
        refuse: why the backward operator has no derivative of its own; `None` where the reference gives it, to any
            order.
        double_backward: whether there is an operator for this derivative too: `(Tensor[] grad_results, Tensor[]
            grad_outputs, <arguments>, bool[] needs, bool[] double_needs) -> Tensor[]`, with one cotangent for each
            result of the backward operator; `double_needs` has one entry for each of grad_outputs and of the tensors
            that `needs` has. What is differentiated further goes through the reference.
    """
    arguments = [tuple(argument.split(" ")) for argument in re.match(r"\((.*)\) -> ", schema).group(1).split(", ")]
    inputs = schema[1 : schema.index(") -> ")]
    LIB.define(f"{name}{schema}")
    LIB.define(f"{name}_backward(Tensor[] grad_outputs, {inputs}, bool[] needs) -> Tensor[]")
    if double_backward:
        LIB.define(
            f"{name}_double_backward(Tensor[] grad_results, Tensor[] grad_outputs, {inputs}, bool[] needs, "
            "bool[] double_needs) -> Tensor[]"
        )
    operator = Operator(name, reference, arguments, differentiable, refuse, double_backward)
    places = [i for i, (_, argument) in enumerate(arguments) if argument in differentiable]

    def backward_reference(grad_outputs: list[Tensor], *inputs_and_needs) -> list[Tensor]:
        *inputs, needs = inputs_and_needs
        flat = _tensors(inputs, places)
        wanted = [i for i, needed in enumerate(needs) if needed]

        def forward(*values):
            replaced = list(flat)
            for i, value in zip(wanted, values, strict=True):
                replaced[i] = value
            return tuple(_flat(reference(*_with_tensors(inputs, places, replaced))))

        _, pullback = torch.func.vjp(forward, *(flat[i] for i in wanted))
        return list(pullback(tuple(grad_outputs)))

    def double_backward_reference(grad_results: list[Tensor], grad_outputs: list[Tensor], *rest) -> list[Tensor]:
        *inputs, needs, double_needs = rest
        everything = [grad_outputs, *inputs]
        positions = [0, *(i + 1 for i in places)]
        flat = _tensors(everything, positions)
        wanted = [i for i, needed in enumerate(double_needs) if needed]

        def first(*values):
            replaced = list(flat)
            for i, value in zip(wanted, values, strict=True):
                replaced[i] = value
            return tuple(backward_reference(*_with_tensors(everything, positions, replaced), needs))

        _, pullback = torch.func.vjp(first, *(flat[i] for i in wanted))
        return list(pullback(tuple(grad_results)))

    operator.kernels = {name: _kernel(reference), f"{name}_backward": _kernel(backward_reference)}
    if double_backward:
        operator.kernels[f"{name}_double_backward"] = _kernel(double_backward_reference)
    for target, kernel in operator.kernels.items():
        LIB.impl(target, kernel, "CompositeExplicitAutograd")
    operator.triton = _triton.register(name, LIB)
    torch.library.register_fake(f"mtml_fast::{name}", fake, lib=LIB)

    def fake_backward(grad_outputs, *inputs_and_needs):
        *inputs, needs = inputs_and_needs
        return [t.new_empty(t.shape) for t, needed in zip(_tensors(inputs, places), needs, strict=True) if needed]

    torch.library.register_fake(f"mtml_fast::{name}_backward", fake_backward, lib=LIB)
    if double_backward:

        def fake_double_backward(grad_results, grad_outputs, *rest):
            *inputs, _, double_needs = rest
            flat = [*grad_outputs, *_tensors(inputs, places)]
            return [t.new_empty(t.shape) for t, needed in zip(flat, double_needs, strict=True) if needed]

        torch.library.register_fake(f"mtml_fast::{name}_double_backward", fake_double_backward, lib=LIB)

    def backward(ctx, *grads):
        inputs = _restore(ctx)
        needs = _flat([ctx.needs_input_grad[i] for i in places if inputs[i] is not None])
        for (_, argument), needed in zip(arguments, ctx.needs_input_grad, strict=True):
            if argument not in differentiable and any(_flat([needed])):
                raise RuntimeError(f"{name}: there is no derivative for {argument}; detach it")
        results = iter(operator.backward(_flat(grads), *inputs, needs))
        return _like_inputs(inputs, ctx.needs_input_grad, results)

    def double_backward(ctx, *grads):
        if refuse is not None:
            raise RuntimeError(f"{name}: {refuse}")
        grad_outputs, *inputs, needs = _restore(ctx)
        everything = [grad_outputs, *inputs]
        # an argument that is absent has a flag and no tensor
        flags = _flat([ctx.needs_input_grad[i] for i in (0, *(i + 1 for i in places)) if everything[i] is not None])
        native = operator.double_backward is not None and not torch.is_grad_enabled()
        compute = operator.double_backward if native else double_backward_reference
        results = iter(compute(_flat(grads), grad_outputs, *inputs, needs, flags))
        return _like_inputs([*everything, needs], ctx.needs_input_grad, results)

    for target, formula in ((name, backward), (f"{name}_backward", double_backward)):
        torch.library.register_autograd(f"mtml_fast::{target}", formula, setup_context=_save, lib=LIB)
    OPERATORS[name] = operator
    return operator


def in_given_dtype(like: Tensor) -> contextlib.AbstractContextManager:
    """A context in which torch's products come in the dtype of their factors, as those of kernels do."""
    device_type = like.device.type
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


def _flat(values) -> list:
    """Tensors (or flags) of a tensor, a tuple, or a sequence with lists inside."""
    if not isinstance(values, (list, tuple)):
        return [values]
    return [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else [value])]


def _tensors(inputs: Sequence, places: Sequence[int]) -> list[Tensor]:
    """The tensors at the given places of the argument list, optional ones left out where absent."""
    return [t for t in _flat([inputs[i] for i in places]) if t is not None]


def _with_tensors(inputs: Sequence, places: Sequence[int], flat: Sequence[Tensor]) -> list:
    """The argument list with the tensors at the given places replaced."""
    values, flat = list(inputs), iter(flat)
    for i in places:
        if isinstance(values[i], (list, tuple)):
            values[i] = [next(flat) for _ in values[i]]
        elif values[i] is not None:
            values[i] = next(flat)
    return values


def _like_inputs(inputs: Sequence, needs: Sequence, results) -> tuple:
    """Gradients in the structure of the inputs, `None` where not needed."""
    grads = []
    for value, needed in zip(inputs, needs, strict=True):
        if isinstance(value, (list, tuple)) and (not value or isinstance(value[0], Tensor)):
            grads.append([next(results) if n else None for n in needed])
        else:
            grads.append(next(results) if needed is True else None)
    return tuple(grads)


def _save(ctx, inputs, output) -> None:
    tensors, skeleton = [], []
    for value in inputs:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor)
        if isinstance(value, Tensor) or is_list:
            skeleton.append(("tensors", len(tensors), len(value) if is_list else None))
            tensors.extend(value if is_list else [value])
        else:
            skeleton.append(("value", value, None))
    ctx.save_for_backward(*tensors)
    ctx.skeleton = skeleton


def _restore(ctx) -> list:
    tensors = list(ctx.saved_tensors)
    values = []
    for kind, value, length in ctx.skeleton:
        if kind == "value":
            values.append(value)
        else:
            values.append(tensors[value] if length is None else tensors[value : value + length])
    return values


def _kernel(function: Callable) -> Callable:
    """A reference as an implementation: its results own their memory and are contiguous, not inputs or views."""

    def kernel(*args):
        taken = {t.untyped_storage().data_ptr() for t in _flat(args) if isinstance(t, Tensor)}

        def own(t: Tensor) -> Tensor:
            t = t.contiguous()
            if t.numel() and t.untyped_storage().data_ptr() in taken:
                t = t.clone()
            taken.add(t.untyped_storage().data_ptr())
            return t

        with ordinary_dispatch():
            results = function(*args)
            return own(results) if isinstance(results, Tensor) else type(results)(map(own, results))

    return kernel
