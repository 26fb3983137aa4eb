"""`paceline train drafter`: a DFlash drafter for any transformers target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train drafters.")


@app.callback()
def train() -> None:
    """Train drafters."""


@app.command()
def drafter(
    target: Annotated[Path, typer.Option(help="target checkpoint directory")],
    data: Annotated[Path, typer.Option(help='JSON lines: {"prompt": text}, {"turns": [..]} or {"prompt_ids": [..]}')],
    out: Annotated[Path, typer.Option(help="gets the drafter, its curves and what is needed to resume")],
    init: Annotated[
        Path | None, typer.Option(help="a drafter to start from; its config.json wins over options")
    ] = None,
    layers: Annotated[int, typer.Option(min=1)] = 5,
    block_size: Annotated[int, typer.Option(min=2)] = 16,
    taps: Annotated[str, typer.Option(help="0-based target layer outputs, comma-separated; empty = spread")] = "",
    mask_token_id: Annotated[int | None, typer.Option(help="default: the tokenizer's mask token")] = None,
    heads: Annotated[int, typer.Option(help="0 = the target's")] = 0,
    kv_heads: Annotated[int, typer.Option(help="0 = the target's")] = 0,
    head_dim: Annotated[int, typer.Option(help="0 = the target's")] = 0,
    intermediate: Annotated[int, typer.Option(help="0 = 3 x hidden")] = 0,
    sliding_window: Annotated[int | None, typer.Option(help="all layers slide; default: full attention")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    batch: Annotated[int, typer.Option(min=1, help="sequences a step")] = 8,
    anchors: Annotated[int, typer.Option(min=1, help="blocks a sequence")] = 512,
    max_length: Annotated[int, typer.Option(min=4)] = 3072,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 6e-4,
    optimizer: Annotated[str, typer.Option(help="adamw or muon")] = "adamw",
    distill: Annotated[bool, typer.Option(help="half of the loss against the target's distribution")] = False,
    block_rows: Annotated[int, typer.Option(min=0, help="rows of a block in training; 0 = block size")] = 0,
    loss: Annotated[str, typer.Option(help="dpace or decay")] = "dpace",
    gamma: Annotated[float, typer.Option(help="of the decay loss")] = 7.0,
    hold_out: Annotated[int, typer.Option(min=1, help="sequences kept for evaluation")] = 64,
    evaluate_every: Annotated[int, typer.Option(min=1)] = 200,
    new_tokens: Annotated[int, typer.Option(min=1, help="length of the target's continuations")] = 512,
    sampled_share: Annotated[float, typer.Option(min=0, max=1, help="continuations at temperature 0.8")] = 0.5,
    generation_batch: Annotated[int, typer.Option(min=1)] = 64,
    seed: int = 0,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="of the frozen target")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="torch threads on CPU")] = 1,
) -> None:
    """Train a DFlash drafter on the target's own continuations of the prompts in DATA.

    The same command resumes an interrupted run: continuations and training state lie in OUT.
    """
    import torch

    from drafter_service.training.curves import draw
    from drafter_service.training.sequences import DataError
    from drafter_service.training.target import TrainingTarget
    from drafter_service.training.trainer import DraftShape, Recipe, Trainer, new_config
    from modeling.dflash import DFlashConfig, DraftCheckpointError
    from paceline.progress import bar

    torch.set_num_threads(threads)
    try:
        frozen = TrainingTarget(target, getattr(torch, dtype), device)
        depth = frozen.config.num_hidden_layers
        shape = DraftShape(
            layers=layers,
            block_size=block_size,
            taps=tuple(int(tap) for tap in taps.split(",") if tap.strip()) or spread_taps(depth, layers),
            mask_token_id=_mask_token(frozen, mask_token_id),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=intermediate,
            sliding_window=sliding_window,
        )
        recipe = Recipe(
            steps=steps,
            batch=batch,
            anchors=anchors,
            max_length=max_length,
            learning_rate=learning_rate,
            optimizer=optimizer,
            distill=distill,
            block_rows=block_rows,
            loss=loss,
            gamma=gamma,
            seed=seed,
            hold_out=hold_out,
            evaluate_every=evaluate_every,
        )
        out.mkdir(parents=True, exist_ok=True)
        sequences = _continuations(frozen, data, out, new_tokens, sampled_share, generation_batch, seed)
        config = DFlashConfig.load(init) if init else new_config(frozen, shape)
        trainer = Trainer(frozen, config, recipe, out, init)
        with bar("training", steps, trainer.step) as advance:
            trainer.run(sequences, lambda _, value, tau: advance(1, f"loss {value:.3f} tau {tau:.2f}"))
        draw(trainer.curve, out / "curves.png")
    except (DataError, DraftCheckpointError, ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    last = trainer.curve[-1]
    typer.echo(f"{out}: step {last.step}, held-out loss {last.held_out_loss:.3f}, tau {last.held_out_tau:.2f}")


def spread_taps(target_layers: int, count: int) -> tuple[int, ...]:
    """Tap layers spread evenly over the target, from the second layer to the third from the end."""
    first, last = min(1, target_layers - 1), max(target_layers - 3, 0)
    if count == 1 or last <= first:
        return (target_layers // 2,)
    return tuple(sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)}))


def _mask_token(frozen, given: int | None) -> int:
    token = given if given is not None else frozen.tokenizer.mask_token_id
    if token is None:
        raise ValueError(
            "--mask-token-id is not given and the target's tokenizer names no mask token: give an unused id"
        )
    return token


def _continuations(frozen, data: Path, out: Path, new_tokens: int, sampled_share: float, batch: int, seed: int) -> list:
    """Finished sequences of DATA plus the target's continuations, which are kept in OUT for the next run."""
    import torch

    from drafter_service.training import sequences
    from paceline.progress import bar

    kept = out / "continuations.jsonl"
    prompts, finished = sequences.read(data, frozen.tokenizer)
    if not prompts:
        return finished
    if kept.exists():
        return finished + sequences.read(kept, frozen.tokenizer)[1]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    split = round(len(prompts) * sampled_share)
    written: list = []
    with bar("continuations", len(prompts)) as advance:
        for temperature, members in ((0.8, order[:split]), (0.0, order[split:])):
            chosen = [prompts[i] for i in members]
            for group in frozen.continue_prompts(chosen, new_tokens, temperature, batch):
                written += group
                advance(len(group), "")
    shuffled = [written[i] for i in torch.randperm(len(written), generator=generator).tolist()]
    sequences.write(kept, shuffled)
    return finished + shuffled
