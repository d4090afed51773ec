"""Presets: published experiments by name, as options of `mtml-fast train`.

A new one is one entry below: its command and that command's options, all of them, so that a default may change without
changing a published experiment.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PRESETS", "expanded"]

# Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017: section 5.1 and appendix A.2
_MAML_SINUSOID = {
    "iterations": 70_000,
    "shots": 10,
    "query-shots": 10,
    "steps": 1,
    "lr": 0.01,
    "meta-lr": 1e-3,
    "meta-batch": 25,
    "eval-tasks": 1000,
}
# the same, Table 1, "MAML, no conv", and appendix A.1; as many query rows as support rows
_MAML_OMNIGLOT_MLP = {
    "model": "mlp",
    "norm": "batch",
    "iterations": 60_000,
    "ways": 5,
    "steps": 1,
    "eval-steps": 3,
    "lr": 0.4,
    "meta-lr": 1e-3,
    "meta-batch": 32,
    "eval-tasks": 1000,
}

PRESETS = {
    "maml-sinusoid": ("sinusoid", _MAML_SINUSOID),
    "maml-omniglot-mlp-5w1s": ("omniglot", {**_MAML_OMNIGLOT_MLP, "shots": 1, "query-shots": 1}),
    "maml-omniglot-mlp-5w5s": ("omniglot", {**_MAML_OMNIGLOT_MLP, "shots": 5, "query-shots": 5}),
}


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments after `train`, with a preset's command and options in place of `--preset NAME`.

    Options that stand beside it come later, and so win.

    Example:
        >>> expanded(["--seed", "1", "--preset", "maml-sinusoid"])[:3]
        ['sinusoid', '--out', 'runs/maml-sinusoid']
        >>> expanded(["--seed", "1", "--preset=maml-sinusoid"])[-4:]
        ['--eval-tasks', '1000', '--seed', '1']
    """
    rest = list(arguments)
    place = next((i for i, argument in enumerate(rest) if argument.split("=")[0] == "--preset"), None)
    if place is None:
        return rest
    name = rest.pop(place).partition("=")[2] or (rest.pop(place) if place < len(rest) else "nothing")
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name}")
    command, settings = PRESETS[name]
    if rest and not rest[0].startswith("-"):
        given = rest.pop(0)
        if given != command:
            raise ValueError(f"--preset {name} must stand with {command} or alone, got {given}")
    settings = {"out": f"runs/{name}", **settings}
    return [command, *(part for key, value in settings.items() for part in (f"--{key}", str(value))), *rest]
