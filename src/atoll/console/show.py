"""How documents look in a terminal: pure functions from a document to something rich can print."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from atoll.console import paces, searches
from atoll.planner.capacity import Outlook
from atoll.planner.explain import duration, told, volume
from atoll.registry.lineage import Branch, LineageTree
from atoll.spec.budget import stated
from atoll.spec.code import CodeView
from atoll.spec.fleet import Fleet
from atoll.spec.model import Model
from atoll.spec.plan import Candidate, Plan
from atoll.spec.run import DeploymentView, RunView, SiteView
from atoll.spec.sync import Sync

_STYLES = {
    "finished": "green",
    "answering": "green",
    "running": "cyan",
    "planning": "cyan",
    "waiting": "yellow",
    "starting": "cyan",
    "failed": "red",
    "cancelled": "yellow",
    "interrupted": "yellow",
    "stopped": "dim",
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_LIVE = 10  # trials in a frame, which is to fit on a screen


def text(value: object, style: str = "") -> Text:
    """Return a value as text that cannot style the terminal or move its cursor: other parties chose these words."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in str(value)
    )
    return Text(shown, style=style)


def number(value: object) -> str:
    """Four significant digits for a float, thousands apart for an integer, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str = "none yet"
) -> RenderableType:
    """A plain table; columns whose name begins with '>' are aligned to the right."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        right = column.startswith(">")
        grid.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    count = 0
    for count, row in enumerate(rows, 1):  # noqa: B007 - the count is used after the loop
        grid.add_row(*(cell if isinstance(cell, Text) else text(cell) for cell in row))
    # The title is no part of the grid, which would wrap it at its own width.
    return Group(text(title, "bold"), grid) if count else text(f"{title}: {empty}", "dim")


def state(word: str) -> Text:
    return text(word, _STYLES.get(word, ""))


# --- plans and runs -------------------------------------------------------------------------------------------------


def plan(found: Plan) -> RenderableType:
    """What was considered, what each would cost, and why one was taken and others were not."""
    rows = [_candidate(item) for item in found.considered]
    parts: list[RenderableType] = []
    if rows:
        parts.append(table("Considered", ("", "candidate", ">time", ">traffic", ">memory", "why"), rows))
    ranks = ", ".join(f"{site} ({layout.ranks})" for site, layout in found.layouts.items())
    parts.append(text(f"Sites (ranks): {ranks or ', '.join(found.sites) or 'none'}"))
    if found.rounds:
        parts.append(text(f"Rounds: {found.rounds} of {', '.join(_rounds_of(found.sync))}"))
    parts += [text(f"Privacy: {line}") for line in stated(found.promises)]
    parts += [text(f"- {line}", "dim") for line in told(found.reasons)]
    return Group(*parts)


def capacity(found: Sequence[Outlook]) -> RenderableType:
    """What a change would do to the plan's price."""
    rows = [
        (
            item.change,
            duration(item.now.seconds),
            duration(item.then.seconds),
            volume(item.now.bytes),
            volume(item.then.bytes),
        )
        for item in found
    ]
    return table("What if", ("change", ">time now", ">then", ">traffic now", ">then"), rows)


def progress(view: RunView, most: int = _LIVE) -> RenderableType:
    """One frame of a run that goes on: the round, the loss, the bytes, what each site is doing, and a sweep's newest
    ``most`` trials (all, where it is 0)."""
    head = Table.grid(padding=(0, 2))
    head.add_row(state(view.state), text(view.work or "-"), *_round(view), text(_loss(view)), text(_bytes(view)))
    sites = Table.grid(padding=(0, 2))
    for name, site in sorted(view.sites.items()):
        step = f"{site.step}/{site.steps}" if site.steps else ""
        mark = text("●", "green" if site.connected else "red")
        pace = text(paces.words(site.pace) if site.pace else "", "dim")
        sites.add_row(mark, text(name), text(site.state if site.connected else "lost"), text(step, "dim"), pace)
    trouble = [text(view.words, "red")] if view.words else []
    trouble += [text(view.withheld, "yellow")] if view.withheld else []
    return Group(head, text(spark(view.losses), "cyan"), sites, *_trials(view, most), *_slow(view), *trouble)


def progress_line(view: RunView) -> str:
    """The same in one line, for a log."""
    sites = " ".join(f"{name}:{site.state if site.connected else 'lost'}" for name, site in sorted(view.sites.items()))
    rate = paces.together(site.pace for site in view.sites.values() if site.pace)
    parts = (view.state, view.work, _counted(view), _loss(view), _bytes(view), rate, sites, view.words)
    return text("  ".join(part for part in parts if part)).plain


def spark(values: Sequence[float], width: int = 60) -> str:
    """A line of blocks for a series, its last value at the right; at most ``width`` characters."""
    step = max(1, -(-len(values) // width))
    shown = list(values)[::-step][::-1]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in shown)


def outcome(view: RunView) -> RenderableType:
    """How a run ended: its tables when it finished, its reason when it did not."""
    head = Text.assemble("Run ", text(view.run, "bold"), " ", state(view.state), f" in {duration(view.seconds)}")
    parts: list[RenderableType] = [head]
    if view.words:
        parts.append(text(view.words, "" if view.state == "finished" else "red"))
    parts += _trials(view)
    found = view.result
    if view.withheld:
        parts.append(text(view.withheld, "yellow"))
    if found is None:
        return Group(*parts)
    if found.columns:
        shown = [[number(cell) for cell in row] for row in found.rows]
        parts.append(table("Result", found.columns, shown, "no rows"))
    if found.suppressed:
        parts.append(text("groups were held back by sites for being too small", "yellow"))
    if found.metrics:
        names = list(found.metrics)
        rows = [[site, *(number(scores.get(name)) for name in names)] for site, scores in sorted(found.by_site.items())]
        rows.append(["all sites", *(number(found.metrics[name]) for name in names)])
        parts.append(table("Held-out examples", ("site", *(f">{name}" for name in names)), rows))
    if found.missing:
        parts.append(text(f"No answer outside training: {', '.join(found.missing)}", "yellow"))
    for site, words in sorted(found.failed.items()):
        said = words if words.startswith(site) else f"{site}: {words}"
        parts.append(text(f"Failed, and the others went on: {said}", "yellow"))
    if found.model:
        parts.append(
            Text.assemble("Model ", text(found.model, "bold"), "  (atoll models show ", text(found.model), ")")
        )
    return Group(*parts)


def runs(views: Sequence[RunView]) -> RenderableType:
    rows = [
        (
            view.run,
            view.name,
            "sweep" if view.sweep else view.job_kind,
            state(view.state),
            _rounds(view),
            number(view.loss),
            duration(view.seconds),
        )
        for view in views
    ]
    listed = table("Runs", ("run", "job", "kind", "state", ">round", ">loss", ">time"), rows)
    others = sum(bool(view.withheld) for view in views)
    words = f"What {others} of them found is for others; `atoll runs show RUN` tells for whom."
    return Group(listed, text(words, "dim")) if others else listed


def run(view: RunView) -> RenderableType:
    """Everything about one run."""
    parts = [outcome(view)] if view.over else [progress(view)]
    about = text(f"job {view.name} ({view.job_kind}) for {view.purpose}, by {view.user}", "dim")
    return Group(about, *([plan(view.plan)] if view.plan else []), *parts, *_paces(view))


def _paces(view: RunView) -> list[RenderableType]:
    """How fast each site trained: now, or in its newest round."""
    rows = [paces.cells(site, pace) for site, pace in view.newest_paces.items()]
    return [table("Pace", paces.COLUMNS, rows), *(_slow(view) if view.over else [])] if rows else []


def _trials(view: RunView, most: int = 0) -> list[RenderableType]:
    """A sweep's trials, and its best objective from trial to trial."""
    if view.sweep is None:
        return []
    found = table("Trials", searches.columns(view.sweep), searches.rows(view.sweep, most))
    return [found, text(f"best so far  {spark(view.sweep.bests)}", "cyan")] if len(view.sweep.bests) > 1 else [found]


def _slow(view: RunView) -> list[RenderableType]:
    """Who holds others up."""
    found = [(site, pace.straggler) for site, pace in view.newest_paces.items() if pace.straggler]
    return [text(f"{site}: {straggler}", "yellow") for site, straggler in found]


# --- models, deployments, sites -------------------------------------------------------------------------------------


def models(found: Sequence[Model], aliases: Mapping[str, Mapping[str, int]]) -> RenderableType:
    rows = []
    for model in found:
        names = [alias for alias, version in aliases.get(model.name, {}).items() if version == model.version]
        scores = ", ".join(f"{name} {number(value)}" for name, value in model.metrics.items())
        privacy = "; ".join(model.stated(brief=True))
        rows.append((model.reference, ", ".join(sorted(names)), scores, privacy, model.lineage.run, model.weights[:19]))
    return table("Models", ("model", "aliases", "metrics", "privacy", "run", "weights"), rows)


def lineage(tree: LineageTree) -> RenderableType:
    """model <- run <- plan <- job, with code, data and decisions, as a tree."""
    branch = tree.branch()
    top = Tree(text(branch.text, "bold"))
    _grow(top, branch)
    return top


def deployments(found: Sequence[DeploymentView]) -> RenderableType:
    rows = [(item.name, item.model, state(item.state), item.url, item.words) for item in found]
    return table("Deployments", ("name", "model", "state", "url", ""), rows)


def sites(found: Sequence[SiteView]) -> RenderableType:
    rows = [
        (
            item.name,
            item.owner,
            item.region,
            _presence(item),
            item.behind or "hub",
            number(item.devices),
            "-" if item.latency_ms is None else f"{item.latency_ms:.1f} ms",
            "(a relay)" if item.relay else ", ".join(item.datasets),
            item.quarantine or item.words,
        )
        for item in found
    ]
    return table("Sites", ("site", "owner", "region", "state", "behind", ">devices", ">latency", "datasets", ""), rows)


def datasets(fleet: Fleet) -> RenderableType:
    rows = [
        (
            item.name,
            site.name,
            number(item.rows),
            len(item.columns),
            ", ".join(f"{p} until {item.until[p]:%Y-%m-%d %H:%M}" if p in item.until else p for p in item.purposes),
            item.min_group,
            str(item.budget or "-"),
            item.fingerprint[:19],
        )
        for site in fleet.sites
        for item in site.datasets
    ]
    columns = ("dataset", "site", ">rows", ">columns", "purposes", ">min group", "privacy budget", "fingerprint")
    return table("Datasets", columns, rows)


def code(found: Sequence[CodeView]) -> RenderableType:
    rows = [(one.state, one.task, one.job, one.user, one.signer.partition("+")[0], one.code) for one in found]
    return table("Code", ("state", "task", "job", "by", "signed by", "digest"), rows, "none")


# --- answers --------------------------------------------------------------------------------------------------------


def prediction(answer: Mapping[str, Any]) -> RenderableType:
    """A deployment's answer: one row for each row asked, then which model said so."""
    told = answer.get("answers")
    rows: list[Mapping[str, Any]] = [row for row in told if isinstance(row, dict)] if isinstance(told, list) else []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    shown = [[index, *(number(row.get(name)) for name in columns)] for index, row in enumerate(rows)]
    words = f"by {answer.get('model')}@{answer.get('version')}, weights {answer.get('digest')}"
    return Group(table("Answers", (">row", *(f">{name}" for name in columns)), shown, "none"), text(words, "dim"))


# --- pieces ---------------------------------------------------------------------------------------------------------


def _presence(item: SiteView) -> RenderableType:
    if item.quarantine:
        return text("quarantine" if item.connected else "quarantine, away", "red")
    return text("connected", "green") if item.connected else text("away", "yellow")


def _candidate(item: Candidate) -> tuple[object, ...]:
    chosen = not item.rejected  # the planner gives a reason to every other one
    why = "\n".join(told(item.rejected)) or "chosen"
    price = item.price
    cost = (duration(price.seconds), volume(price.bytes), volume(price.memory_bytes)) if price else ("-", "-", "-")
    mark = text("✓", "green") if chosen else text("✗", "red")
    return (mark, text(item.name, "bold" if chosen else ""), *cost, text(why, "green" if chosen else "dim"))


def _rounds_of(sync: Sync) -> Iterator[str]:
    """Yield how a round goes, and what of that is not so where nothing is said about it."""
    yield f"{sync.stride} steps" if sync.seconds is None else f"{sync.stride} steps or {duration(sync.seconds)}"
    yield f"{sync.exchange} exchanged"
    if sync.fragments > 1:
        yield f"one of {sync.fragments} fragments in turn"
    if sync.delay:
        yield f"mixed in {sync.delay} steps later"
    if sync.blend:
        yield f"{sync.blend:.0%} of a site's own staying"
    if sync.control:
        yield "with control variates"
    for way, steps in (("up", sync.wire), ("down", sync.down)):
        if steps:
            yield f"{way} as {' + '.join(step.kind for step in steps)}"
    if sync.keep_local:
        yield f"{' '.join(sync.keep_local)} staying at each site"


def _rounds(view: RunView) -> str:
    return f"{view.round}/{view.rounds}" if view.rounds else "-"


def _round(view: RunView) -> tuple[RenderableType, ...]:
    if not view.rounds:
        return ()
    return (text(_counted(view)), ProgressBar(total=view.rounds, completed=view.round, width=24))


def _counted(view: RunView) -> str:
    noun = "trials" if view.sweep else "round"
    return f"{noun} {view.round}/{view.rounds}" if view.rounds else ""


def _loss(view: RunView) -> str:
    if view.sweep:
        return searches.best(view.sweep)
    return "" if view.loss is None else f"loss {view.loss:.4f}"


def _bytes(view: RunView) -> str:
    moved = view.bytes_up or view.bytes_down
    return f"up {volume(view.bytes_up)}, down {volume(view.bytes_down)}" if moved else ""


def _grow(stem: Tree, branch: Branch) -> None:
    for below in branch.below:
        _grow(stem.add(text(below.text)), below)
