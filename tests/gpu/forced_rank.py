"""As deploy.rank_process, for one rank of a counting target: its drafts are forced (tests/gpu/counting_pair.py)."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from deploy import rank_process
from deploy.link import make_link


def main() -> int:
    with mock.patch.object(rank_process, "make_link", _forced):
        return rank_process.main()


def _forced(settings: Any, fuser: Any, *, vocabulary: int, **identity: Any) -> Any:
    from tests.gpu.counting_pair import ForcedLink  # brings torch

    link = make_link(settings, fuser, vocabulary=vocabulary, **identity)
    return ForcedLink(link, vocabulary, fuser.block_size)


if __name__ == "__main__":
    sys.exit(main())
