"""Where a call goes: to the operator, or to its reference.

The dispatcher chooses between devices and between native code and the reference. One question is left to Python: under
functorch transforms and forward-mode AD a registered backward formula is refused or silently wrong, so those calls go
to the reference, which torch differentiates itself. This is the only file that uses private names of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

_backend: ContextVar[str] = ContextVar("mtml_fast_backend", default="auto")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose who serves the operators inside a `with` block: "auto" (the fastest there is) or "reference".

    Raises:
        ValueError: for another name.

    Example:
        >>> import mtml_fast as mf
        >>> with mf.backend("reference"):
        ...     pass
    """
    if name not in ("auto", "reference"):
        raise ValueError(f"name must be 'auto' or 'reference', got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def needs_reference() -> bool:
    """Whether the present call must be served by the reference."""
    return _backend.get() == "reference" or in_transform()


def in_transform() -> bool:
    """Whether a functorch transform (grad, vmap, jvp, ...) or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_kernel(name: str, key: str) -> bool:
    """Whether operator `name` has its own kernel for a dispatch key such as "CPU"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
