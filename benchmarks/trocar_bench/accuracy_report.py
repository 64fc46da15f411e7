"""What `bench-accuracy` tells: tables for people, and the rows of its last line."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby

from rich.console import Console
from rich.table import Table

from trocar_bench.figures import Figures, ObjectResult, compare, mean_jf, sum_up
from trocar_bench.rows import Row
from trocar_engines.memory.bank import MemoryPolicy

DECIMALS = 3
TABLE_COLUMNS = 140
OF_ROWS = tuple(field.name for field in fields(Figures))
OF_AN_OBJECT = (
    "jf",
    "jf_visible",
    "presence_precision",
    "presence_recall",
    "switches",
    "absences",
    "switched_absences",
    "returns",
    "returns_found",
    "seconds_to_find",
    "class_accuracy",
)


def take(results: Sequence[ObjectResult], *, apart: bool = False) -> list[ObjectResult]:
    """The objects that count in the means, or those that are scored apart."""
    return [result for result in results if result.timeline.facts.is_apart is apart]


def round_figures(value: object) -> object:
    """A figure or an interval as the last line tells it."""
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, tuple):
        return [round_figures(one) for one in value]
    return value


def average_clips(results: Sequence[ObjectResult]) -> dict[str, object]:
    """J&F by clip, mean over its objects."""
    by_clip = groupby(results, key=lambda result: result.clip)
    return {clip: round_figures(sum_up(list(group), ()).jf) for clip, group in by_clip}


def describe_rows(
    rows: Sequence[Row], by_row: Sequence[Sequence[ObjectResult]], classes: Sequence[str]
) -> list[dict[str, object]]:
    """The part of the last line that belongs to each row."""
    lines = []
    for row, results in zip(rows, by_row, strict=True):
        taken, apart = take(results), take(results, apart=True)
        line: dict[str, object] = {
            "policy": row.policy,
            "ablation": row.ablation,
            "prompt": row.prompt,
            **_describe(sum_up(taken, classes)),
            "clips": average_clips(taken),
            "by_object": {
                f"{result.clip}/{result.timeline.object_id}": _describe(
                    sum_up([result], classes), OF_AN_OBJECT
                )
                for result in results
            },
        }
        baseline = _find_baseline(rows, row)
        if baseline is not None:
            gain = compare(taken, take(by_row[baseline]), lambda timeline: timeline.visible)
            if gain is not None:
                line["gain"] = {
                    "over": rows[baseline].name,
                    "jf_visible": round_figures(gain.points),
                    "interval": round_figures(gain.interval),
                }
        if apart:
            line["apart"] = _describe(sum_up(apart, classes))
        lines.append(line)
    return lines


def _describe(figures: Figures, names: Sequence[str] = OF_ROWS) -> dict[str, object]:
    return {name: round_figures(getattr(figures, name)) for name in names}


def _find_baseline(rows: Sequence[Row], row: Row) -> int | None:
    """Place of the row that this one is compared with, None for itself.

    An ablation is compared with its own policy, a policy with `vanilla`, or else with the first one.
    """
    if row.ablation:
        policy = row.policy
    else:
        policies = [other.policy for other in rows]
        vanilla = MemoryPolicy.VANILLA.value
        policy = vanilla if vanilla in policies else policies[0]
    for place, other in enumerate(rows):
        if (other.policy, other.ablation, other.prompt) == (policy, "", row.prompt):
            return place if other is not row else None
    return None


def print_objects(
    rows: Sequence[Row], by_row: Sequence[Sequence[ObjectResult]], floor: Sequence[ObjectResult]
) -> None:
    """J&F over frames that show the object, by clip and object: a column per row, one for the floor."""
    table = Table("clip", "object", title="J&F over frames that show the object", title_justify="left")
    columns = [*by_row, *([floor] if floor else [])]
    names = [*(row.name for row in rows), *(["optical flow"] if floor else [])]
    for header in ("frames", *names):
        table.add_column(header, justify="right")
    for results in zip(*columns, strict=True):
        timeline = results[0].timeline
        mark = " (apart)" if timeline.facts.is_apart else ""
        table.add_row(
            results[0].clip,
            f"{timeline.object_id}{mark}",
            str(len(timeline.visible)),
            *(_cell(mean_jf(result.timeline.visible)) for result in results),
        )
    _print_table(table)


def print_rows(rows: Sequence[Row], by_row: Sequence[Sequence[ObjectResult]], classes: Sequence[str]) -> None:
    """Means over objects: a line per row, and one for the objects apart, whose class is to be unknown."""
    table = Table("policy", "ablation", "prompt", "objects")
    headers = (
        "J",
        "F",
        "J&F",
        "visible",
        "95% of it",
        "precision",
        "recall",
        "switched",
        "found",
        "s",
        "class",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for row, results in zip(rows, by_row, strict=True):
        for name, some in (("known", take(results)), ("apart", take(results, apart=True))):
            if some:
                figures = sum_up(some, classes)
                table.add_row(row.policy, row.ablation, row.prompt, name, *_cells(figures))
    _print_table(table)


def _cells(figures: Figures) -> list[str]:
    interval = figures.jf_visible_interval
    return [
        *(_cell(value) for value in (figures.j, figures.f, figures.jf, figures.jf_visible)),
        f"{interval[0]:.1f}-{interval[1]:.1f}" if interval else "",
        _cell(figures.presence_precision),
        _cell(figures.presence_recall),
        _cell(figures.switched_absences),
        _cell(figures.returns_found),
        _cell(figures.seconds_to_find),
        _cell(figures.unknown_share if figures.class_accuracy is None else figures.class_accuracy),
    ]


def _print_table(table: Table) -> None:
    """Print at least so wide that figures stay whole where nobody's terminal sets the width."""
    console = Console()
    Console(width=None if console.is_terminal else max(console.width, TABLE_COLUMNS)).print(table)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
