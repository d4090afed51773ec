"""python -m mtml_fast.env: what it says is so."""

import subprocess
import sys

import mtml_fast
from mtml_fast import env
from mtml_fast.ops import OPERATORS
from mtml_fast.ops._library import build_info


def test_report():
    text = subprocess.run([sys.executable, "-m", "mtml_fast.env"], capture_output=True, text=True, check=True).stdout
    assert f"mtml_fast   {mtml_fast.__version__}" in text
    for name, _ in env.VARIABLES:
        assert name in text
    for name in OPERATORS:
        assert name in text
    assert build_info()["isa"] in text


def test_services():
    served = {(s.operator, s.device): s.served_by for s in env.services()}
    assert set(served.values()) <= {"native", "triton", "reference"}
    assert {name for name, _ in served} == set(OPERATORS)
    # the tests run with the native library built
    assert served["sgd_step", "cpu"] == "native"
    assert all(s.why for s in env.services())
