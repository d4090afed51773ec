"""Where a call goes: to the operator, or to its reference.

The dispatcher chooses between devices and between native code and the reference. One question is left to Python: under
functorch transforms and forward-mode AD a registered backward formula is refused or silently wrong, so those calls go
to the reference, which torch differentiates itself. This is the only file that uses private names of torch; whoever
needs one finds it here under a public one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# every tensor of a list times a number, in one call
foreach_mul = torch._foreach_mul

# a plain global: torch.compile guards on it, and cannot trace a ContextVar
_backend = "auto"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose who serves the operators inside a `with` block; the choice holds for the whole process.

    Args:
        name: "auto", the fastest there is: native kernels, and the reference where a device has none; "operator",
            always the registered operator, whose backward pass is an operator too; "reference", always pure PyTorch.

    Raises:
        ValueError: for another name.

    Example:
        >>> import mtml_fast as mf
        >>> with mf.backend("reference"):
        ...     pass
    """
    if name not in ("auto", "operator", "reference"):
        raise ValueError(f"name must be 'auto', 'operator' or 'reference', got {name!r}")
    global _backend
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def needs_reference(native: bool) -> bool:
    """Whether the present call goes to the reference, for tensors that native kernels can or cannot serve.

    Without native kernels the operator is right but does the forward work twice, as its backward pass starts from the
    inputs; autograd through the reference does it once. A compiler gets the operator, which it need not look into.
    """
    if _backend == "reference" or in_transform():
        return True
    return not native and _backend == "auto" and not torch.compiler.is_compiling()


def is_plain() -> bool:
    """Whether nothing but plain autograd watches: no transform, compiler or dispatch mode, and no forced backend."""
    return (
        _backend == "auto"
        # first of the questions: a compiler cannot trace the others
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
    )


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` for calls that `is_plain` has let through: what it looks for first costs 2 us."""
    return super(torch.autograd.Function, function).apply


def versions(tensors: list[Tensor]) -> list[int]:
    """How often each tensor has been changed in place; those of inference mode do not count."""
    return [0 if t.is_inference() else t._version for t in tensors]


def in_transform() -> bool:
    """Whether a functorch transform (grad, vmap, jvp, ...) or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _dispatch_state() -> tuple:
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


# the dispatch state of an ordinary call: that of a new thread, for this one may be importing under autocast
with ThreadPoolExecutor(1) as _thread:
    _INCLUDED, _EXCLUDED = _thread.submit(_dispatch_state).result()


@contextlib.contextmanager
def ordinary_dispatch() -> Iterator[None]:
    """Run a reference inside an operator as if it were called from outside, with nothing recorded.

    A kernel runs with autograd and, under a TorchDispatchMode, with functorch switched off; a reference takes
    gradients and needs both.
    """
    with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.no_grad():
        yield


def has_kernel(name: str, device_type: str) -> bool:
    """Whether operator `name` has its own kernel for a type of device, such as "cpu"."""
    key = "Meta" if device_type == "meta" else device_type.upper()
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    except RuntimeError:
        # a device whose dispatch key has another name: nobody registers kernels for it here
        return False


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does other things than the forward of its class."""
    return "forward" in vars(module) or any(hook_tables(module))


def hook_tables(module: nn.Module) -> tuple[dict, ...]:
    """Where a module keeps what is called along with its forward."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def part_tables(module: nn.Module) -> tuple[dict, ...]:
    """Where a module keeps its own parameters and its children."""
    return module._parameters, module._modules
