"""`python -m tests.fuzz NAME [corpus folder...] [libFuzzer options]`: one target with coverage guidance, by atheris."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["sst_kernels", "sst_merge", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS

if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
    sys.exit(f"{__doc__}\nNAME is one of {', '.join(TARGETS)}")
atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
atheris.Fuzz()
