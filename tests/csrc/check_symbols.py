"""Fails when an object compiled for one instruction set holds a weak symbol, or none was found: `make nm`.

A weak (inline) function that is compiled for AVX-512 and for plain x86-64 under one name is kept once by the linker,
which may pick the AVX-512 copy for all; on an older processor that is a crash far from its cause.
"""

import subprocess
import sys
from pathlib import Path

objects = sorted(Path(sys.argv[1]).rglob("*.isa.cpp.o"))
weak = []
for path in objects:
    listing = subprocess.run(["nm", "--demangle", str(path)], check=True, capture_output=True, text=True).stdout
    weak += [f"{path}: {line.strip()}" for line in listing.splitlines() if line[17:18] in ("W", "V", "w", "v", "u")]
if weak or not objects:
    sys.exit("\n".join(weak) or f"no objects of an instruction set under {sys.argv[1]}: run make setup")
print(f"{len(objects)} objects, no weak symbols")
