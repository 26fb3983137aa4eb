"""Nothing is loaded from a hub, and no code that lies in a checkpoint is run."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import torch

from cluster.api.tokens import Tokens
from drafter_service.config import DrafterSettings
from drafter_service.loading import load_drafter
from verifier_service.model.runner import TargetRunner

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SPY = "import pathlib\npathlib.Path({mark!r}).touch()\nfrom transformers import {theirs} as Mine\n"


def load_target(directory: Path) -> TargetRunner:
    return TargetRunner(directory, num_blocks=4, block_tokens=16, num_slots=1, dtype=torch.float32, device="cpu")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    directory, mark = tmp_path / "target", tmp_path / "it was run"
    shutil.copytree(TINY / "target", directory)
    (directory / "spy.py").write_text(SPY.format(mark=str(mark), theirs="PretrainedConfig"))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((directory / name).read_text())
        content["auto_map"] = {
            "AutoConfig": "spy.Mine",
            "AutoModelForCausalLM": "spy.Mine",
            "AutoTokenizer": "spy.Mine",
        }
        (directory / name).write_text(json.dumps(content))
    load_target(directory)
    Tokens.load(directory)
    assert not mark.exists()


def test_no_name_is_looked_up_while_a_pair_is_loaded(monkeypatch):
    asked: list[object] = []

    def refuse(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("no name is looked up here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_target(TINY / "target")
    Tokens.load(TINY / "target")
    load_drafter(DrafterSettings(target=str(TINY / "target"), checkpoint=str(TINY / "drafter"), device="cpu"))
    assert asked == []
