"""J over time as a picture: a panel per clip, a line per configuration and object."""

from collections.abc import Sequence
from itertools import cycle, groupby
from pathlib import Path

from trocar_bench.figures import ObjectResult
from trocar_bench.rows import Row

PANEL_INCHES = (11.0, 2.2)
DPI = 110
STYLES = ("-", "--", "-.", ":")
"""Rows in turn: lines that fall together stay visible."""


def draw_plot(path: Path, rows: Sequence[Row], by_row: Sequence[Sequence[ObjectResult]]) -> None:
    """Draw J over time; grey is where the first object of a clip is absent.

    Args:
        path: of the PNG.
        rows: the configurations.
        by_row: results of each, the same objects in the same order.
    """
    # The optional dependency, loaded without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_clip = [
        (clip, [places[0] for places in group])
        for clip, group in groupby(enumerate(by_row[0]), key=lambda item: item[1].clip)
    ]
    figure = Figure(figsize=(PANEL_INCHES[0], PANEL_INCHES[1] * len(by_clip)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(by_clip), 1, squeeze=False)[:, 0]
    for panel, (clip, places) in zip(panels, by_clip, strict=True):
        first = by_row[0][places[0]].timeline
        for absence in first.absences:
            end = absence.until if absence.back is None else absence.back
            panel.axvspan(
                absence.begin / first.frame_rate_hz, end / first.frame_rate_hz, color="0.9", linewidth=0
            )
        for row, results, style in zip(rows, by_row, cycle(STYLES), strict=False):
            for place in places:
                timeline = results[place].timeline
                label = f"{row.name}, object {timeline.object_id}" if len(places) > 1 else row.name
                seconds = [record.frame / timeline.frame_rate_hz for record in timeline.records]
                values = [100 * record.region_similarity for record in timeline.records]
                panel.plot(seconds, values, style, linewidth=0.9, label=label)
        panel.set(title=clip, ylim=(-2, 102), ylabel="J")
        panel.margins(x=0.01)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="x-small")
    panels[-1].set_xlabel("s")
    figure.savefig(path, dpi=DPI)
