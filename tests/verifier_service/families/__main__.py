"""The campaign from the command line: prints its table, and writes docs/families.md if told to."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.verifier_service.families.campaign import EXPLANATION, prove, table, table_of_bits, wrongs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verifier_service.families", description=__doc__)
    parser.add_argument("--texts", type=int, default=4, help="sets of prompts for each family")
    parser.add_argument("--schedules", type=int, default=9, help="random schedules for each set and number of ranks")
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--deterministic", action="store_true", help="in that mode as well; compares bits in both")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that all of it may take")
    parser.add_argument("--write", type=Path, help="write the table there, e.g. docs/families.md")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.schedules)
    schedules = {1: seeds, 2: seeds, 4: seeds}
    steady = schedules if options.deterministic else None
    with tempfile.TemporaryDirectory() as root:
        proofs = prove(Path(root), range(options.texts), schedules, options.timeout, steady)
    found = table(proofs)
    print(found)
    if options.deterministic:
        print(table_of_bits(proofs))
    print("\n".join(wrongs(proofs)))
    if options.write is not None:
        options.write.write_text(f"{EXPLANATION}\n{found}\n")
    return 1 if wrongs(proofs) else 0


if __name__ == "__main__":
    sys.exit(main())
