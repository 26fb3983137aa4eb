"""Prints a plan as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from modeling.footprint import CacheFootprint
from paceline.plan.document import DraftPlan, Plan, TargetPlan, link_bytes_per_step
from paceline.plan.gpus import GPUS
from paceline.plan.memory import RankMemory
from paceline.plan.reading import Source

GIGA, MEGA, KILO = 1e9, 1e6, 1e3


def show(plan: Plan, console: Console) -> None:
    """Everything, in the order in which it is worked out; what does not fit comes last."""
    console.print(f"[bold]{plan.model_name}[/bold] ({plan.file})", highlight=False)
    console.print(_groups(plan))
    console.print(_parts(plan.target))
    for line in _of_target(plan.target):
        console.print(f"  {line}", highlight=False)
    console.print(_rank(plan.target))
    if plan.drafter is not None:
        console.print(_drafter(plan.drafter))
        for line in _of_drafter(plan.drafter):
            console.print(f"  {line}", highlight=False)
    if plan.loads:
        console.print(_steps(plan))
        console.print(_pools(plan))
        for line in _assumptions(plan):
            console.print(f"  {line}", highlight=False)
    for note in plan.notes:
        console.print(f"[cyan]note:[/cyan] {note}", highlight=False)
    for problem in plan.problems:
        console.print(f"[red]does not fit:[/red] {problem.what}", highlight=False)
        for cure in problem.cures:
            console.print(f"  would fit: {cure}", highlight=False)
    if plan.fits and plan.target.gpu is not None:
        console.print("[green]fits[/green]")


def size(count: float) -> str:
    """Bytes for people: 1.23 GB."""
    for unit, name in ((GIGA, "GB"), (MEGA, "MB"), (KILO, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1 if count >= 10 * unit else 2}f} {name}"
    return f"{count:.0f} B"


def parameters(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 5e6 else f"{count / 1e6:.2f} M"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _groups(plan: Plan) -> Table:
    table = _table("Groups", "group", "replicas", "processes each", "GPUs each", "bundle of a process", "placement")
    for group in plan.groups:
        bundle = ", ".join(f"{key}: {value:g}" for key, value in group.bundle.items())
        gpus = str(group.gpus) if group.gpus else "-"
        table.add_row(group.name, str(group.replicas), str(group.processes), gpus, bundle, group.placement)
    return table


def _parts(target: TargetPlan) -> Table:
    title = f"Target: {parameters(target.parameters)} parameters, {parameters(target.active_parameters)} active a token"
    table = _table(
        f"{title}; {target.packing}; TP {target.size}", "part", "parameters", "on a rank", "bytes", "divided"
    )
    for part in target.parts:
        share = f"1/{part.parameters / part.rank_parameters:.1f}".removesuffix(".0")
        held = "all" if part.replicated else share
        table.add_row(
            part.name, parameters(part.parameters), parameters(part.rank_parameters), size(part.rank_bytes), held
        )
    table.add_section()
    together = sum(part.rank_parameters for part in target.parts)
    table.add_row("together", parameters(target.parameters), parameters(together), size(target.memory.weights), "")
    return table


def _of_target(target: TargetPlan) -> list[str]:
    lines = [_kv_line(target.cache, target.size)]
    cache = target.cache
    if cache.state_bytes:
        lines.append(
            f"recurrent state: {size(cache.state_bytes)} a request and rank, {size(cache.state_total_bytes)} over all "
            "ranks; a checkpoint of it takes as much again"
        )
    if target.kv_capacity is not None:
        lines.append(
            f"KV capacity: {max(0, target.kv_capacity):,} tokens in the memory of {target.gpu}; the file asks for "
            f"{target.kv_cache_tokens:,}"
        )
    lines.append(f"read from {target.source.path}")
    lines += _assumed(target.source)
    return lines


def _assumed(source: Source) -> list[str]:
    return [f"assumed there: {', '.join(source.assumed)}"] if source.assumed else []


def _kv_line(cache: CacheFootprint, ranks: int) -> str:
    line = f"KV: {size(cache.token_bytes)} a token and rank, in {cache.layers} layers"
    if ranks == 1:
        return line
    if cache.latent:
        return f"{line}; MLA latents are replicated: all {ranks} ranks hold the same, so more ranks bring no capacity"
    if cache.copies > 1:
        return f"{line}; fewer KV heads than ranks: {cache.copies} ranks hold the same ones"
    return f"{line}; every rank holds its own heads"


def _rank(target: TargetPlan) -> Table:
    memory = target.memory
    table = _table("The verifier's first rank", "memory", "bytes")
    for name, amount in _rows(memory):
        table.add_row(name, size(amount))
    table.add_section()
    table.add_row("together", size(memory.total))
    if memory.available is not None:
        table.add_row(f"of {target.gpu}", size(memory.available))
    return table


def _rows(memory: RankMemory) -> list[tuple[str, int]]:
    rows = [
        ("weights", memory.weights),
        ("of the drafter (fc; all of it if colocated)", memory.drafter),
        ("KV cache", memory.kv_cache),
        ("recurrent states", memory.states),
        ("checkpoints of states", memory.checkpoints),
        ("runtime, activations, logits (estimate)", memory.working),
    ]
    return [(name, amount) for name, amount in rows if amount]


def _drafter(drafter: DraftPlan) -> Table:
    where = f"on {drafter.gpu or 'a device of its own'}" if drafter.remote else "inside the verifier's first rank"
    table = _table(
        f"Drafter, {where}: block {drafter.block_size}, window {drafter.window:,}", "part", "amount", "bytes"
    )
    itemsize = drafter.memory.weights // max(1, sum(count for name, count in drafter.parts.items() if name != "fc"))
    for name, count in drafter.parts.items():
        label = {"fc": "fc (on the verifier)", "embedding": "embedding (the target's)", "head": "head (the target's)"}
        table.add_row(label.get(name, name), parameters(count), size(count * itemsize))
    table.add_section()
    contexts = f"{drafter.max_contexts} x {size(drafter.context_bytes)}"
    table.add_row("draft contexts", contexts, size(drafter.memory.contexts))
    table.add_row("runtime (estimate)", "", size(drafter.memory.working))
    table.add_row("together", "", size(drafter.memory.total))
    if drafter.memory.available is not None:
        table.add_row(f"of {drafter.gpu}", "", size(drafter.memory.available))
    return table


def _of_drafter(drafter: DraftPlan) -> list[str]:
    lines = [f"context KV: {size(drafter.row_bytes)} a token"]
    if drafter.context_capacity is not None:
        lines.append(
            f"draft-context capacity: {max(0, drafter.context_capacity)} in the memory of {drafter.gpu}; the file "
            f"asks for {drafter.max_contexts}"
        )
    lines.append(f"read from {drafter.source.path}")
    lines += _assumed(drafter.source)
    return lines


def _steps(plan: Plan) -> Table:
    table = _table(
        f"Steps of one verifier on {plan.target.gpu or 'its machine'} with one drafter on {_place(plan)} (ms)",
        *(
            "requests",
            "plain step",
            "drafts",
            "verify",
            "draft",
            "tokens/s",
            "speed-up",
            "link a step",
            "link a second",
        ),
    )
    for load in plan.loads:
        step, moved = load.step, link_bytes_per_step(plan.link, load) if plan.link is not None else 0.0
        table.add_row(
            str(load.requests),
            milliseconds(load.plain_s),
            str(step.drafts or "plain"),
            milliseconds(step.verify_s),
            milliseconds(step.draft_s) if step.drafts else "-",
            f"{load.tokens_per_s:,.0f}",
            f"{step.speedup:.1f}",
            *((size(moved), size(moved / step.seconds)) if moved else ("-", "-")),
        )
    return table


def _place(plan: Plan) -> str:
    return (plan.drafter.gpu if plan.drafter is not None else None) or "its machine"


def _pools(plan: Plan) -> Table:
    table = _table("Drafters for a verifier, by the drafters' GPU type", "requests", *GPUS)
    for load in plan.loads:
        table.add_row(str(load.requests), *(str(load.pools[name]) for name in GPUS))
    return table


def _assumptions(plan: Plan) -> list[str]:
    lines = [
        "'1 for 6, x2.0': one drafter has time and memory for six such verifiers, and each decodes twice as fast as "
        "without; '2 each': a verifier wants two; 'plain': drafting there costs more than it gives",
        f"seconds: {'; '.join(plan.priced)}; of other GPU types always estimated",
        f"estimates for {plan.acceptance:g} tokens a step with whole blocks, {plan.context:,} tokens of context, "
        "evenly routed experts: change them with --acceptance and --context",
    ]
    if plan.link is not None:
        lines.append(
            f"link: {size(plan.link.token_bytes)} of fused features a token ({plan.link.dtype}; "
            f"{size(plan.link.raw_tap_bytes)} if the taps went unfused), {size(plan.link.prefill_step_bytes)} for a "
            "step that is all prefill"
        )
    return lines
