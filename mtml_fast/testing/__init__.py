"""The battery that every operator passes, on every backend, and that downstream operators may use.

`op_battery(function, operator, cases, ...)` returns named checks; a test runs each of them:

    @pytest.mark.parametrize("check", op_battery(...), ids=str)
    def test_battery(check):
        check()

The checks run on the registered operator (`mtml_fast.backend("operator")`), whoever serves it. The rule for values: the
error against float64 may be at most twice that of eager PyTorch in the same dtype, on these inputs or on inputs one
rounding off, task by task (in float64, where the exact values err like eager's, three times); nowhere a tolerance
chosen by hand. Cotangents are random; the seed is fresh and printed.
"""

from __future__ import annotations

from mtml_fast.testing.battery import assert_as_exact as assert_as_exact
from mtml_fast.testing.battery import op_battery as op_battery
from mtml_fast.testing.cases import BadInput as BadInput
from mtml_fast.testing.cases import Case as Case
from mtml_fast.testing.cases import Check as Check
