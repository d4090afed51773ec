"""op_battery: the checks themselves."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtml_fast.ops import backend
from mtml_fast.ops._define import Operator
from mtml_fast.testing.arguments import (
    expanded,
    floats,
    in_dtype,
    map_tensors,
    offset,
    poison,
    rounded,
    select,
    tensors_in,
    transposed,
)
from mtml_fast.testing.cases import BadInput, Case, Check

# a kernel may be this many units in the last place of the largest value worse than twice eager's error
SLACK_ULPS = 8
# how often inputs are drawn one rounding off: an error that such inputs make too is no kernel's fault
ROUNDINGS = 3
# and how often more before a number is called worse
MORE_ROUNDINGS = 32


def op_battery(
    function: Callable,
    operator: Operator,
    cases: Sequence[Case],
    *,
    per_task: Callable[[list[Tensor], dict], list[list[Tensor]]],
    bad_inputs: Sequence[BadInput] = (),
    device: str | None = None,
) -> list[Check]:
    """The checks of a public function and the operator behind it.

    Args:
        function: called with a case's keyword arguments; returns tensors (in tuples, lists, with `None`).
        operator: what `define_op` returned.
        cases: at least one `tiny` one.
        per_task: `(flat results, arguments) -> one list of tensors for each task`.
        bad_inputs: changes of the first case's arguments.
        device: where the checks run; `None`: what MTML_FAST_TEST_DEVICE names, or the CPU.
    """
    device = device or os.environ.get("MTML_FAST_TEST_DEVICE", "cpu")
    battery = _Battery(function, operator, per_task, device)
    checks = []
    for case in cases:
        names = ["values", "layouts", "tasks", "purity"]
        if case.tiny:
            names += ["gradcheck", "second_order", "maml_probe", "opcheck", "functorch", "compiled"]
        for name in names:
            checks.append(Check(f"{case.id}-{name}", lambda case=case, name=name: getattr(battery, name)(case)))
    for bad in bad_inputs:
        if bad.reads and device != "cpu":
            continue
        checks.append(Check(f"bad-{bad.id}", lambda bad=bad: battery.bad_input(cases[0], bad)))
    return checks


def assert_as_exact(candidate: Tensor, eager: Sequence[Tensor], exact: Tensor, what: str) -> None:
    """The candidate's largest error is at most twice the largest of eager's, all against the same float64 values.

    In float64 these are eager's own, off by as much as it is: |candidate - exact| may be that much larger.
    """
    assert candidate.shape == exact.shape, f"{what}: shape {list(candidate.shape)}, expected {list(exact.shape)}"
    for value in (candidate, *eager):
        same = torch.equal(value.isfinite(), exact.isfinite())
        assert same, f"{what}: not finite in other places than the exact values"
    finite = exact.isfinite()
    if not finite.any():
        return
    exact = exact[finite]
    error, *others = [(value[finite].double() - exact).abs().max() for value in (candidate, *eager)]
    allowed, scale = max(others), exact.abs().max()
    times = 3 if candidate.dtype == torch.float64 else 2
    slack = SLACK_ULPS * torch.finfo(candidate.dtype).eps * scale
    assert error <= times * allowed + slack, (
        f"{what}: error {error:.3e}, eager PyTorch's {allowed:.3e}, slack {slack:.1e}, largest value {scale:.3e}"
    )


class _Battery:
    def __init__(self, function, operator, per_task, device):
        self.function, self.operator, self.per_task, self.device = function, operator, per_task, device
        self.native = operator.served_by(device) != "reference"
        # by how much two runs may differ: on a device torch's own sums have no fixed order
        self.may_differ = 0.0 if self.native or device == "cpu" else 1e-9

    def values(self, case: Case) -> None:
        """Values and all gradients against the reference in float64, task by task where they have tasks."""
        for dtype in (torch.float32, torch.float64):
            with self.seeded(case) as seed:
                arguments = self.arguments(case, seed, dtype)
                with backend("reference"):
                    exact = self.with_gradients(in_dtype(arguments, torch.float64), seed)
                    eager = [self.with_gradients(arguments, seed)]
                eager += self.other_roundings(arguments, dtype, seed, ROUNDINGS)
                if dtype == torch.float64:
                    eager += self.as_float32_errs(arguments, exact, seed, ROUNDINGS)
                for name in ("auto", "operator"):
                    with backend(name):
                        mine = self.with_gradients(arguments, seed)
                    try:
                        self.as_exact(mine, exact, eager, arguments, f"in {dtype} by {name!r}")
                    except AssertionError:
                        # a number alone may be exact by chance in as few runs of eager; it is not in many
                        eager += self.other_roundings(arguments, dtype, seed, MORE_ROUNDINGS)
                        self.as_exact(mine, exact, eager, arguments, f"in {dtype} by {name!r}")

    def other_roundings(self, arguments: dict, dtype: torch.dtype, seed: int, count: int) -> list[_Outcome]:
        """Eager PyTorch on arguments that are off by their last bit."""
        with backend("reference"):
            return [self.with_gradients(rounded(arguments, torch.finfo(dtype).eps), seed) for _ in range(count)]

    def as_float32_errs(self, arguments: dict, exact: _Outcome, seed: int, count: int) -> list[_Outcome]:
        """The exact values with eager's errors in float32, as large as the same roundings are in float64.

        What float64 itself shows is too little: a tanh near 1 is rounded, but to the same number for all inputs nearby.
        """
        narrow, wide = torch.float32, torch.float64
        part = torch.finfo(wide).eps / torch.finfo(narrow).eps
        outcomes = []
        for _ in range(count):
            inputs = rounded(in_dtype(arguments, narrow), torch.finfo(narrow).eps)
            with backend("reference"):
                pair = [self.with_gradients(a, seed) for a in (inputs, in_dtype(inputs, wide))]
            kinds = []
            for kind in ("results", "gradients"):
                values = zip(getattr(exact, kind), *(getattr(p, kind) for p in pair), strict=True)
                kinds.append([torch.where(e.isfinite(), e + part * (a.double() - b), e) for e, a, b in values])
            outcomes.append(_Outcome(*kinds))
        return outcomes

    def as_exact(self, mine, exact, eager: Sequence, arguments: dict, what: str) -> None:
        for kind in ("results", "gradients"):
            parts = [getattr(x, kind) for x in (mine, exact, *eager)]
            if kind == "results":
                parts = [[t for ts in self.per_task(p, arguments) for t in ts] for p in parts]
            for i, (a, b, *c) in enumerate(zip(*parts, strict=True)):
                assert_as_exact(a, c, b, f"{kind}[{i}] {what}")

    def layouts(self, case: Case) -> None:
        """Transposed, expanded and offset inputs give the result of the contiguous ones."""
        with self.seeded(case) as seed:
            arguments = self.arguments(case, seed, torch.float64)
            for name, layout in (("transposed", transposed), ("offset", offset), ("expanded", expanded)):
                changed = map_tensors(arguments, layout)
                plain = map_tensors(changed, lambda t: t.contiguous().clone())
                a, b = self.with_gradients(changed, seed), self.with_gradients(plain, seed)
                self.equal(a.results + a.gradients, b.results + b.gradients, name)

    def tasks(self, case: Case) -> None:
        """The same bits again, on any number of threads and for a task alone; a NaN stays in its own task."""
        with self.seeded(case) as seed:
            arguments = self.arguments(case, seed, torch.float32)
            first = self.with_gradients(arguments, seed)
            threads = torch.get_num_threads()
            try:
                for count in (threads, 1, 2, 4):
                    torch.set_num_threads(count)
                    again = self.with_gradients(arguments, seed)
                    what = f"{count} threads"
                    self.equal(first.results + first.gradients, again.results + again.gradients, what)
            finally:
                torch.set_num_threads(threads)
            if not case.axes:
                return
            together = self.per_task(first.results, arguments)
            for t in range(len(together)):
                alone = self.results(select(arguments, case.axes, [t]))
                self.equal(together[t], self.per_task(alone, select(arguments, case.axes, [t]))[0], f"task {t} alone")
            if len(together) > 1:
                poisoned = self.results(poison(arguments, case.axes, task=1))
                for t, (a, b) in enumerate(zip(together, self.per_task(poisoned, arguments), strict=True)):
                    if t != 1:
                        self.equal(a, b, f"task {t} beside a task with NaN")

    def purity(self, case: Case) -> None:
        """Inputs stay as they were, unwritten memory is never read, gradients come only where asked for."""
        with self.seeded(case) as seed:
            arguments = self.arguments(case, seed, torch.float64)
            before = map_tensors(arguments, Tensor.clone)
            plain = self.with_gradients(arguments, seed)
            for a, b in zip(tensors_in(arguments), tensors_in(before), strict=True):
                assert torch.equal(a, b), "an input was changed"
            deterministic = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty comes filled with NaN
            try:
                with warnings.catch_warnings():
                    if self.device != "cpu":
                        # some of torch's own operations say there that they know no such way
                        warnings.simplefilter("ignore", UserWarning)
                    filled = self.with_gradients(arguments, seed)
            finally:
                torch.use_deterministic_algorithms(deterministic)
            self.equal(plain.results + plain.gradients, filled.results + filled.gradients, "poisoned memory")
            leaves = self.differentiable(arguments)
            for i in range(len(leaves)):
                inputs = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
                results = floats(self.function(**self.replace(arguments, inputs)))
                torch.autograd.backward(results, self.cotangents(results, seed))
                assert all((leaf.grad is None) == (i != j) for j, leaf in enumerate(inputs)), f"gradient of input {i}"
                self.equal([inputs[i].grad], [plain.gradients[i]], f"gradient of input {i} alone")

    def gradcheck(self, case: Case) -> None:
        """First derivatives against finite differences."""
        with self.seeded(case) as seed:
            call, inputs = self.closed(case, seed)
            assert torch.autograd.gradcheck(call, inputs, nondet_tol=self.may_differ)

    def second_order(self, case: Case) -> None:
        """Second derivatives against finite differences, or a refusal that is an error."""
        with self.seeded(case) as seed:
            call, inputs = self.closed(case, seed)
            with backend("reference"):
                assert torch.autograd.gradgradcheck(call, inputs, nondet_tol=self.may_differ)
            if self.offers_second_order(call, inputs, seed):
                assert torch.autograd.gradgradcheck(call, inputs, nondet_tol=self.may_differ)

    def maml_probe(self, case: Case) -> None:
        """An outer loss of the inputs themselves and of the gradient at them: catches silent first order."""
        with self.seeded(case) as seed:
            call, inputs = self.closed(case, seed)

            def outer() -> list[Tensor]:
                leaves = [t.detach().requires_grad_() for t in inputs]
                results = call(*leaves)
                inner = torch.autograd.grad(results, leaves, self.cotangents(results, seed), create_graph=True)
                total = sum(((a + g).sin()).sum() for a, g in zip(leaves, inner, strict=True))
                return list(torch.autograd.grad(total, leaves))

            with backend("reference"):
                exact = outer()
            if self.offers_second_order(call, inputs, seed):
                for i, (a, b) in enumerate(zip(outer(), exact, strict=True)):
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, i=i: f"input {i}: {m}")
            direct = [t.cos() for t in inputs]
            assert any(not torch.allclose(a, b) for a, b in zip(exact, direct, strict=True)), "the probe probes nothing"

    def opcheck(self, case: Case) -> None:
        """Schema, autograd registration, fake implementation and tracing of both operators."""
        with self.seeded(case) as seed:
            arguments = self.arguments(case, seed, torch.float64)
            raw = self.raw_arguments(arguments)
            leaves = [
                leaf.requires_grad_()
                for (_, name), value in zip(self.operator.arguments, raw, strict=True)
                if name in self.operator.differentiable
                for leaf in tensors_in(value)
            ]
            torch.library.opcheck(self.operator.forward, raw)
            results = self.operator.forward(*raw)
            results = [results] if isinstance(results, Tensor) else list(results)
            cotangents = self.cotangents(results, seed)
            detached = map_tensors(list(raw), Tensor.detach)
            # the fourth test runs a backward pass, which an operator may refuse
            tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
            arguments = (cotangents, *detached, [True] * len(leaves))
            torch.library.opcheck(self.operator.backward, arguments, test_utils=tests)

    def functorch(self, case: Case) -> None:
        """grad, vmap, vmap of grad, and forward mode equal plain autograd."""
        with self.seeded(case) as seed:
            call, inputs = self.closed(case, seed)
            inputs = tuple(t.detach() for t in inputs)
            results = call(*inputs)
            weights = self.cotangents(results, seed)

            def scalar(*values):
                return sum((a * w).sum() for a, w in zip(call(*values), weights, strict=True))

            places = tuple(range(len(inputs)))
            leaves = [t.clone().requires_grad_() for t in inputs]
            plain = torch.autograd.grad(scalar(*leaves), leaves)
            _close(torch.func.grad(scalar, argnums=places)(*inputs), plain, "func.grad")

            other = tuple(t + 0.01 * torch.randn_like(t) for t in inputs)
            stacked = tuple(torch.stack(pair) for pair in zip(inputs, other, strict=True))
            loop = [torch.stack(pair) for pair in zip(call(*inputs), call(*other), strict=True)]
            _close(torch.func.vmap(call)(*stacked), loop, "vmap")
            pair = [torch.func.grad(scalar, argnums=places)(*x) for x in (inputs, other)]
            loop = [torch.stack(grads) for grads in zip(*pair, strict=True)]
            _close(torch.func.vmap(torch.func.grad(scalar, argnums=places))(*stacked), loop, "vmap(grad)")

            jacobian = torch.func.jacrev(scalar, argnums=places)(*inputs)
            _close(jacobian, plain, "func.jacrev")

            def inner(*values):
                return sum((g * g).sum() for g in torch.func.grad(scalar, argnums=places)(*values))

            with backend("reference"):
                twice = torch.autograd.grad(scalar(*leaves), leaves, create_graph=True)
                expected = torch.autograd.grad(sum((g * g).sum() for g in twice), leaves, allow_unused=True)
            mine = torch.func.grad(inner, argnums=places)(*inputs)
            _close(
                mine,
                [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, expected, strict=True)],
                "grad(grad)",
            )

            tangents = tuple(torch.randn_like(t) for t in inputs)
            along = sum((g * t).sum() for g, t in zip(plain, tangents, strict=True))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its decompositions
                _, forward = torch.func.jvp(scalar, inputs, tangents)
                with torch.autograd.forward_ad.dual_level():
                    duals = [torch.autograd.forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)]
                    dual = torch.autograd.forward_ad.unpack_dual(scalar(*duals)).tangent
            _close([forward], [along], "func.jvp")
            assert dual is not None, "forward-mode AD lost the tangent"
            _close([dual], [along], "forward_ad")

    def compiled(self, case: Case) -> None:
        """torch.compile, forward and backward and over func.grad, equals eager."""
        with self.seeded(case) as seed:
            call, inputs = self.closed(case, seed)
            weights = self.cotangents(call(*inputs), seed)

            def scalar(*values):
                return sum((a * w).sum() for a, w in zip(call(*values), weights, strict=True))

            plain = torch.autograd.grad(scalar(*inputs), inputs)
            torch.compiler.reset()
            compiled = torch.compile(scalar, backend="aot_eager", fullgraph=True)
            _close(torch.autograd.grad(compiled(*inputs), inputs), plain, "compile")
            # torch cannot differentiate a compiled graph twice; what matters is that it says so
            try:
                once = torch.autograd.grad(compiled(*inputs), inputs, create_graph=True)
                torch.autograd.grad(sum((a * g).sum() for a, g in zip(inputs, once, strict=True)), inputs)
            except RuntimeError:
                pass
            else:
                raise AssertionError("a compiled graph was differentiated twice: hold it against eager from now on")
            torch.compiler.reset()
            places = tuple(range(len(inputs)))
            compiled = torch.compile(torch.func.grad(scalar, argnums=places), backend="aot_eager", fullgraph=True)
            _close(compiled(*(t.detach() for t in inputs)), plain, "compile(func.grad)")

    def bad_input(self, case: Case, bad: BadInput) -> None:
        """The error, with its name and value, on every backend."""
        with self.seeded(case) as seed:
            arguments = self.arguments(case, seed, torch.float32)
            message = bad.message.replace("cpu", str(tensors_in(arguments)[0].device))
            arguments = map_tensors(bad.change(arguments), lambda t: t if t.is_meta else t.to(self.device))
            for name in ("auto", "operator", "reference"):
                with backend(name):
                    try:
                        self.function(**arguments)
                    except (TypeError, ValueError) as error:
                        assert type(error) is bad.error, f"{type(error).__name__}: {error}"
                        assert message in str(error), f"expected {message!r} in: {error}"
                        assert "\n" not in str(error), f"more than one line: {error}"
                    else:
                        raise AssertionError(f"no error, expected {bad.error.__name__}: {bad.message}")

    @contextlib.contextmanager
    def seeded(self, case: Case) -> Iterator[int]:
        """A fresh seed, printed (pytest shows it with a failure); MTML_FAST_TEST_SEED repeats one."""
        seed = int(os.environ.get("MTML_FAST_TEST_SEED", int.from_bytes(os.urandom(3), "big")))
        print(f"{self.operator.name}, case {case.id}: repeat with MTML_FAST_TEST_SEED={seed}")
        torch.manual_seed(seed)
        with backend("operator"):
            yield seed

    def arguments(self, case: Case, seed: int, dtype: torch.dtype) -> dict:
        arguments = case.make(dtype, torch.Generator().manual_seed(seed))
        return map_tensors(arguments, lambda t: t.detach().to(self.device))

    def results(self, arguments: dict) -> list[Tensor]:
        return floats(self.function(**arguments))

    def with_gradients(self, arguments: dict, seed: int) -> _Outcome:
        inputs = [t.detach().requires_grad_() for t in self.differentiable(arguments)]
        results = floats(self.function(**self.replace(arguments, inputs)))
        # some results are constants (the losses of unlabelled rows), and some inputs unused (the rates of no steps)
        pairs = zip(results, self.cotangents(results, seed), strict=True)
        pairs = [(r, c) for r, c in pairs if r.requires_grad]
        outputs, cotangents = [r for r, _ in pairs], [c for _, c in pairs]
        gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
        return _Outcome([r.detach() for r in results], list(gradients))

    def cotangents(self, results: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Random, never constant, the same for every dtype; zero where a result is not finite."""
        generator = torch.Generator().manual_seed(seed + 1)
        draws = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
        return [torch.where(r.isfinite(), d.to(r), 0.0) for r, d in zip(results, draws, strict=True)]

    def differentiable(self, arguments: dict) -> list[Tensor]:
        values = [arguments.get(name) for name in self.operator.differentiable]
        return [t for t in tensors_in(values) if t.is_floating_point()]

    def replace(self, arguments: dict, inputs: Sequence[Tensor]) -> dict:
        replaced, rest = dict(arguments), iter(inputs)
        for name in self.operator.differentiable:
            if name in arguments:
                replaced[name] = map_tensors(arguments[name], lambda t: next(rest) if t.is_floating_point() else t)
        return replaced

    def closed(self, case: Case, seed: int) -> tuple[Callable, tuple[Tensor, ...]]:
        """The call as a function of its differentiable tensors, and these in float64."""
        arguments = self.arguments(case, seed, torch.float64)

        def call(*inputs):
            results = floats(self.function(**self.replace(arguments, inputs)))
            # a result that is -inf by definition (an absent class) has no finite difference
            return tuple(torch.where(r.isinf(), 0.0, r) for r in results)

        return call, tuple(t.requires_grad_() for t in self.differentiable(arguments))

    def raw_arguments(self, arguments: dict) -> tuple:
        """What the public function hands to the operator."""
        seen = []
        forward = self.operator.forward
        try:
            self.operator.forward = lambda *args: seen.append(args) or forward(*args)
            self.function(**arguments)
        finally:
            self.operator.forward = forward
        return seen[0]

    def offers_second_order(self, call, inputs, seed: int) -> bool:
        """Whether a second derivative is there; where it is not, asking for it must raise."""
        if self.operator.refuse is None:
            return True
        leaves = [t.detach().requires_grad_() for t in inputs]
        results = call(*leaves)
        inner = torch.autograd.grad(results, leaves, self.cotangents(results, seed), create_graph=True)
        try:
            torch.autograd.grad(sum((a * g).sum() for a, g in zip(leaves, inner, strict=True)), leaves)
        except RuntimeError as error:
            assert self.operator.name in str(error), f"refused without its name: {error}"
            return False
        raise AssertionError("a derivative that is not offered was not refused")

    def equal(self, a: Sequence[Tensor], b: Sequence[Tensor], what: str) -> None:
        """The same bits from native code; from the reference, whose sums are torch's, up to rounding."""
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if self.native:
                same = torch.equal(x.nan_to_num(nan=0.5), y.nan_to_num(nan=0.5)) and torch.equal(x.isnan(), y.isnan())
                assert same, f"{what}: result {i} has other bits (by up to {(x - y).abs().max():.1e})"
            else:
                tolerance = 2e-4 if x.dtype == torch.float32 else 1e-9
                torch.testing.assert_close(
                    x, y, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, i=i: f"{what}, {i}: {m}"
                )


@dataclass(frozen=True)
class _Outcome:
    results: list[Tensor]
    gradients: list[Tensor]


def _close(a: Sequence[Tensor], b: Sequence[Tensor], what: str) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9, msg=lambda m, i=i: f"{what}, {i}: {m}")
