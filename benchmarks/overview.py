"""Tables of everything: satchel beside BackPACK and the best of all peers, its lower bound and its target."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, inf, isinf, log
from typing import Any

from cells import CELLS, NOTHING
from report import bound_ratio, lower_bound, peers, table_head, table_line, value
from targets import BACKPACK, BEST_PEER, SET, TARGETS

HEAD = ["network", "features", "satchel", "BackPACK", "best peer", "bound", "target", "MB"]


def overview(results: dict[str, Any], clock: str = "cpu") -> str:
    """Markdown. Bold: no peer is faster. Extra peak memory: satchel's and the leanest peer's."""
    lines = table_head(HEAD)
    for network, cells in results["networks"].items():
        for cell, found in cells.items():
            ours, others = value(found.get("satchel", {}), clock), peers(found, clock)
            best = min(others, key=lambda name: others[name], default="")
            least = min(peers(found, "memory").values(), default=inf)
            target = TARGETS.get(network, {}).get(cell)
            lines.append(
                table_line([
                    network,
                    cell,
                    _marked(ours, others.get(best, inf)),
                    _number(others.get("backpack", inf)),
                    "–" if isinf(others.get(best, inf)) else f"{_number(others[best])} ({best})",
                    bound_ratio(found, clock),
                    "–" if target is None else f"{target:g}{' ✓' if ours <= target else ''}",
                    f"{_megabytes(value(found.get('satchel', {}), 'memory'))} / {_megabytes(least)}",
                ])
            )  # fmt: skip
    tables = (summary, missed, sets, wide)
    return "\n".join([*lines, *(line for table in tables for line in ("", *table(results, clock)))])


def wide(results: dict[str, Any], clock: str = "cpu") -> Iterator[str]:
    """README's table, networks across: satchel / BackPACK / the best peer; satchel alone where there is no peer."""
    networks = {name: cells for name, cells in results["networks"].items() if len(cells) > 1}
    yield from table_head(["features", *networks])
    for cell in CELLS:
        yield table_line([cell, *(_beside(cells.get(cell, {}), clock) for cells in networks.values())])


def _beside(found: dict[str, Any], clock: str) -> str:
    ours, others = value(found.get("satchel", {}), clock), peers(found, clock)
    best = min(others.values(), default=inf)
    shown = _marked(ours, best)
    return (
        shown if isinf(ours) or isinf(best) else f"{shown} / {_number(others.get('backpack', inf))} / {_number(best)}"
    )


def missed(results: dict[str, Any], clock: str = "cpu") -> Iterator[str]:
    """What is above its target or a peer, in parts: the bound, what the engine takes that computes nothing, and the rest."""
    head = ["network", "features", "satchel", "aim", "= bound", "+ engine", "+ rest"]
    yield from table_head(head)
    for network, cells in results["networks"].items():
        engine = value(cells.get(NOTHING, {}).get("satchel", {}), clock) - 1
        for cell, found in cells.items():
            ours, others = value(found.get("satchel", {}), clock), peers(found, clock)
            aims = {"target": TARGETS.get(network, {}).get(cell, inf), **others}
            nearest = min(aims, key=lambda name: aims[name])
            least = lower_bound(found, clock)
            if isinf(ours) or least is None or ours <= aims[nearest]:
                continue
            parts = ["–" if isinf(part) else _number(part) for part in (least, engine, ours - least - engine)]
            yield table_line([network, cell, _number(ours), f"{_number(aims[nearest])} ({nearest})", *parts])


def sets(results: dict[str, Any], clock: str = "cpu") -> Iterator[str]:
    """What sets of features cost beside their dearest member, and the writes of the others' results."""
    head = ["network", "set", "satchel", "dearest member", f"{SET:g} × dearest + writes", ""]
    yield from table_head(head)
    for network, cells in results["networks"].items():
        for cell, found in cells.items():
            ours, members = value(found.get("satchel", {}), clock), CELLS[cell]
            ratios = {name: value(cells.get(name, {}).get("satchel", {}), clock) for name in members}
            written = found.get("satchel", {}).get("bound", {}).get("written")
            if len(members) < 2 or isinf(ours) or isinf(max(ratios.values())) or written is None:
                continue
            dearest = max(members, key=lambda name: ratios[name])
            gradient = found["satchel"][clock]["plain_ms"] / 1000
            others = sum(written[name][clock] for name in members if name != dearest) / gradient
            most = SET * ratios[dearest] + others
            numbers = [_number(ours), f"{_number(ratios[dearest])} ({dearest})", _number(most)]
            yield table_line([network, cell, *numbers, "✓" if ours <= most else ""])


def summary(results: dict[str, Any], clock: str = "cpu") -> Iterator[str]:
    """In how many cells no peer is faster, and the geometric means."""
    cells = [found for network in results["networks"].values() for found in network.values()]
    ours = [(value(found.get("satchel", {}), clock), peers(found, clock)) for found in cells]
    ours = [(mine, others) for mine, others in ours if not isinf(mine)]
    beside = [(mine, min(others.values())) for mine, others in ours if not isinf(min(others.values(), default=inf))]
    backpack = [(mine, others["backpack"]) for mine, others in ours if not isinf(others.get("backpack", inf))]
    yield f"No peer is faster in {sum(mine <= best for mine, best in beside)} of the {len(beside)} cells that one has."
    for what, pairs, target in (("the best peer's", beside, BEST_PEER), ("BackPACK's", backpack, BACKPACK)):
        if pairs:
            mean = exp(sum(log(mine / other) for mine, other in pairs) / len(pairs))
            yield f"Geometric mean of the ratio to {what} over {len(pairs)} cells: {mean:.2f} (target {target:g})."


def _marked(ours: float, best: float) -> str:
    """Bold where no peer is faster."""
    return f"**{_number(ours)}**" if ours <= best and not isinf(ours) else _number(ours)


def _megabytes(amount: float) -> str:
    return "–" if isinf(amount) else f"{round(amount)}"


def _number(ratio: float) -> str:
    return "–" if isinf(ratio) else f"{ratio:.3g}" if ratio >= 100 else f"{ratio:.2f}"
