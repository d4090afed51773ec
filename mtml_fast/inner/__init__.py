"""The first floor: the inner loop. adapt() picks a plan for a model and runs K steps for all tasks; or it is solved."""

from mtml_fast.inner.adapted import Adapted as Adapted
from mtml_fast.inner.adapted import adapt as adapt
from mtml_fast.inner.loop import InnerLoop as InnerLoop
from mtml_fast.inner.plan import Explanation as Explanation
from mtml_fast.inner.plan import KnownPlan as KnownPlan
from mtml_fast.inner.plan import explain as explain
from mtml_fast.inner.plan import plan_for as plan_for
from mtml_fast.inner.ridge import ridge_head as ridge_head
