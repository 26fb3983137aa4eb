"""One rank of a verifier as a process of its own, without Ray: `python -m deploy.rank_process --settings JSON ...`.

Prints one JSON line once all ranks are loaded: {"ready": "host:port"} of the engine port on rank 0, {"ready": ""} on
the others. Exit status: 2 for settings that cannot be served, 1 for anything that failed later.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from cluster.errors import PacelineError
from cluster.own_process import read_settings, when_orphaned
from deploy.link import make_link
from verifier_service.config import VerifierSettings
from verifier_service.fit import check_fit


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if options.exit_with_parent:  # at once: the main thread may be in a collective that nobody will ever answer
        when_orphaned(os.getppid(), lambda: os._exit(1))
    settings = read_settings(VerifierSettings, options.settings)
    if settings is None:
        return 2
    try:
        check_fit(settings)
        from verifier_service.rank import run_rank  # brings torch and transformers: not needed to refuse settings

        run_rank(
            settings,
            options.rank,
            options.rendezvous,
            engine_id=options.engine_id,
            host=options.host,
            make_link=make_link if options.rank == 0 else None,
            on_ready=_print_ready,
        )
    except (PacelineError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        print(f"rank {options.rank} failed: {error!r}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.rank_process", description=__doc__)
    parser.add_argument("--settings", required=True, help="VerifierSettings as JSON; - = from standard input")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--rendezvous", default="", help="host:port, free on rank 0's machine; not for a single rank")
    parser.add_argument("--engine-id", default="verifier")
    parser.add_argument("--host", default="127.0.0.1", help="where rank 0 opens the engine port")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when the parent process is gone")
    return parser


def _print_ready(address: str) -> None:
    print(json.dumps({"ready": address}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
