"""Average the weights of two drafters of one training run: better on text neither has seen than the later of the two.

python -m models.build.average build/c build/d --out build/drafter
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs=2, help="--out directories of `paceline train drafter`")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    first, second = (torch.load(run / "training.pt", weights_only=True)["model"] for run in arguments.runs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    mean = {name: ((first[name] + second[name]) / 2).to(torch.bfloat16).contiguous() for name in second}
    save_file(mean, arguments.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(arguments.runs[1] / "config.json", arguments.out / "config.json")


if __name__ == "__main__":
    main()
