"""heads in Triton: each launch is a linear layer of all tasks, forward or backward.

Without a hidden layer: forward one launch; backward one for x and two for the parameters, which read x once. Ragged
widths take one more, to find where each task's outputs begin; a hidden layer adds its own, and its activation, which is
torch's. Offsets stay where they are, but for one number that comes back: how many outputs ragged widths make.
"""

from torch import Tensor

from mtml_fast.ops._ragged.triton import backward, forward, gradients
from mtml_fast.ops._task_heads.triton import Heads, activated_reverse


def heads(*arguments) -> Tensor:
    """z = h W^T + b, packed."""
    x, offsets, _, _, out_offsets, *_ = arguments
    head = Heads(*arguments)
    size = head.rows.count * head.outputs.width
    if out_offsets is not None:
        size = int((offsets.diff() * out_offsets.diff()).sum())
    return forward(head.rows, head.outputs, [(head.h, head.weight)], head.bias, x.new_empty(size))


def heads_backward(grad_outputs: list[Tensor], *arguments) -> list[Tensor]:
    """The gradients of <q, z> that are needed."""
    *arguments, needs = arguments
    head, q = Heads(*arguments), grad_outputs[0].contiguous()
    need, found = head.named(needs), {}
    if need["x"] or need["hidden_weight"] or need["hidden_bias"]:
        found = head.before(backward(head.rows, head.outputs, [(q, head.weight)], head.h), need)
    of_head = need["weight"], need["bias"]
    found["weight"], found["bias"] = gradients(head.rows, head.outputs, [(q, head.h)], of_head)
    return head.results(found, need)


def heads_double_backward(grad_results: list[Tensor], grad_outputs: list[Tensor], *arguments) -> list[Tensor]:
    """The gradients of the sum of <g, result> over the results of heads_backward: q's, and the inputs', as needed.

    The names are those of docs/maths/heads.md.
    """
    *arguments, needs, (q_needed, *double_needs) = arguments
    head, q = Heads(*arguments), grad_outputs[0].contiguous()
    rows, x, need = head.rows, head.x, head.named(double_needs)
    given = [name for name, needed in zip(head.inputs, needs, strict=True) if needed]
    g = dict(zip(given, (t.contiguous() for t in grad_results), strict=True))
    gx, gW, gV = g.get("x"), g.get("weight"), g.get("hidden_weight")
    found = {"bias": head.bias.new_zeros(head.bias.shape) if need["bias"] else None}
    if head.hidden is None:
        moved = gx
        if need["x"]:
            found["x"] = backward(rows, head.outputs, _pairs((q, gW)), x)
    else:
        V, gV = head.hidden_weight, None if gV is None else gV.flatten(0, 1)
        a1 = forward(rows, head.hidden, _pairs((gx, V), (x, gV)), g.get("hidden_bias"), head.new_hidden())
        e, s = (backward(rows, head.outputs, _pairs((q, w)), head.h) for w in (head.weight, gW))
        da, moved, r = activated_reverse(head.activation, head.a, e, a1, s)
        needs = need["hidden_weight"], need["hidden_bias"]
        found["hidden_weight"], found["hidden_bias"] = gradients(rows, head.hidden, _pairs((r, x), (da, gx)), needs)
        if need["x"]:
            found["x"] = backward(rows, head.hidden, _pairs((r, V), (da, gV)), x)
    if need["weight"] and moved is not None:
        found["weight"], _ = gradients(rows, head.outputs, [(q, moved)], (True, False))
    elif need["weight"]:
        found["weight"] = head.weight.new_zeros(head.weight.shape)
    results = head.results(found, need)
    if q_needed:
        to = q.new_empty(q.shape)
        results.insert(0, forward(rows, head.outputs, _pairs((moved, head.weight), (head.h, gW)), g.get("bias"), to))
    return results


def _pairs(*given: tuple) -> list[tuple]:
    """Pairs of a product; where a cotangent is missing there is none."""
    return [pair for pair in given if pair[0] is not None and pair[1] is not None]
