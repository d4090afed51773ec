"""Timings: what is timed stands in registry.py, who else does the same in peers/, how in run.py and verify.py.

What came out is appended to results/; report.py makes the tables and the picture of the documentation from it.
"""

import os

from mtml_fast.cli.timing import limit_to_isa

# before torch starts its threads: waiting ones must not burn the other core
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# a compile time is one from nothing
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
limit_to_isa()
