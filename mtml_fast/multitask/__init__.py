"""Several tasks, one model: how their losses become one step, and which tasks belong together."""

from mtml_fast.multitask.affinity import Affinity as Affinity
from mtml_fast.multitask.affinity import affinity as affinity
from mtml_fast.multitask.balance import Balance as Balance
from mtml_fast.multitask.balance import task_gradients as task_gradients
from mtml_fast.multitask.copies import TaskCopies as TaskCopies
from mtml_fast.multitask.surgery import IMTLG as IMTLG
from mtml_fast.multitask.surgery import MGDA as MGDA
from mtml_fast.multitask.surgery import AlignedMTL as AlignedMTL
from mtml_fast.multitask.surgery import CAGrad as CAGrad
from mtml_fast.multitask.surgery import GradDrop as GradDrop
from mtml_fast.multitask.surgery import GradNorm as GradNorm
from mtml_fast.multitask.surgery import GradVac as GradVac
from mtml_fast.multitask.surgery import NashMTL as NashMTL
from mtml_fast.multitask.surgery import PCGrad as PCGrad
from mtml_fast.multitask.surgery import UPGrad as UPGrad
from mtml_fast.multitask.weighting import DWA as DWA
from mtml_fast.multitask.weighting import FAMO as FAMO
from mtml_fast.multitask.weighting import GLS as GLS
from mtml_fast.multitask.weighting import RLW as RLW
from mtml_fast.multitask.weighting import STCH as STCH
from mtml_fast.multitask.weighting import Equal as Equal
from mtml_fast.multitask.weighting import Uncertainty as Uncertainty

BALANCES = {
    "equal": Equal,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "dwa": DWA,
    "rlw": RLW,
    "gls": GLS,
    "stch": STCH,
    "famo": FAMO,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "imtl_g": IMTLG,
    "nash_mtl": NashMTL,
    "aligned_mtl": AlignedMTL,
    "graddrop": GradDrop,
    "upgrad": UPGrad,
}


def balance_of(value: "str | Balance", num_tasks: int) -> Balance:
    """A `Balance` of so many tasks, from its name in any case, or itself.

    Example:
        >>> balance_of("dwa", num_tasks=3)
        DWA(num_tasks=3, temperature=2.0, every=1)
    """
    if isinstance(value, str):
        if value.lower() not in BALANCES:
            raise ValueError(f"balance must be one of {', '.join(map(repr, BALANCES))}, got {value!r}")
        kind = BALANCES[value.lower()]
        return kind(num_tasks) if kind.keeps_tasks else kind()
    if not isinstance(value, Balance):
        raise TypeError(f"balance must be a name or a mtml_fast.multitask.Balance, got {type(value).__name__}")
    if value.num_tasks not in (None, num_tasks):
        raise ValueError(f"balance must be one of {num_tasks} tasks, got num_tasks={value.num_tasks}")
    return value
