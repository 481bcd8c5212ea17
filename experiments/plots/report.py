"""A run as one HTML page: results, pictures, curves, settings, and the command that repeats the run.

The page is one file without scripts or links to the network, so that it can be mailed or archived. It knows no
experiment: `measures.py` explains each number by its name, and `report.html.jinja` has the layout.
"""

import base64
import io
import mimetypes
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from experiments.launch.atomic_files import write_text
from experiments.plots.measures import MEASURES, format_value, measure_name, measure_order
from experiments.plots.metric_curves import metric_figures


def write_report(
    path: Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
    config: Mapping[str, Any],
    lead: str = '',
    command: str = '',
    differences: Collection[str] = (),
) -> None:
    """Writes the page, with links to the data files and pictures in its folder.

    Args:
      path: The HTML file to write.
      title: What was run.
      summary: Measures of each arm, `{arm: {measure: value}}`. Other entries are shown below the table. An arm is a
        column, or a row where there are more arms than measures.
      metrics: Rows with an `epoch`, an `arm`, and numbers or None. Each column of numbers becomes a chart.
      pictures: Image files by caption.
      config: Settings. An entry that is a mapping (such as versions) becomes a table with its name as heading.
      lead: A sentence or two on what was compared.
      command: The command line that repeats the run.
      differences: Names in `summary` of differences between arms.
    """
    arms = {name: values for name, values in summary.items() if isinstance(values, Mapping)}
    measures = sorted({key for values in arms.values() for key in values}, key=_order)
    by_arm = len(arms) > len(measures)
    figures = metric_figures(metrics)
    explained = sorted({*measures, *figures}, key=_order)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=format_value, name=measure_name, data_uri=_data_uri, alt=_alt_text)
    page = environment.get_template('report.html.jinja').render(
        title=title,
        lead=lead,
        command=command,
        results=_results(arms, measures, differences, by_arm),
        by_arm=by_arm,
        collapsed=[name for name, values in arms.items() if values.get('collapsed')],
        remarks={key: value for key, value in summary.items() if key not in arms},
        pictures=pictures,
        charts={column: figures[column] for column in sorted(figures, key=_order)},
        explanations={key: MEASURES[key][1] for key in explained if key in MEASURES},
        settings={key: value for key, value in config.items() if not isinstance(value, Mapping)},
        tables={key: value for key, value in config.items() if isinstance(value, Mapping)},
        files=_data_files(path.parent),
    )
    write_text(path, page)


def _results(
    arms: Mapping[str, Mapping[str, Any]], measures: Sequence[str], differences: Collection[str], by_arm: bool
) -> dict[str, dict[str, str]]:
    """Returns the texts of the table of results, by row and column."""

    def text(arm: str, measure: str) -> str:
        return format_value(arms[arm].get(measure), measure, difference=arm in differences)

    if by_arm:
        return {arm: {measure_name(measure): text(arm, measure) for measure in measures} for arm in arms}
    return {measure_name(measure): {arm: text(arm, measure) for arm in arms} for measure in measures}


def _order(measure: str) -> tuple[int, str]:
    return measure_order(measure), measure


def _alt_text(chart: Figure, column: str) -> str:
    """Describes a chart in words: its column, and the last value of each arm."""
    (axes,) = chart.axes
    _, labels = axes.get_legend_handles_labels()
    return f'{measure_name(column)} over the epochs; last values: {", ".join(map(str, labels))}'


def _data_uri(picture: Path | Figure) -> str:
    if isinstance(picture, Figure):
        data = io.BytesIO()
        picture.savefig(data, format='png')
        kind, content = 'image/png', data.getvalue()
    else:
        kind, content = mimetypes.guess_type(picture)[0], picture.read_bytes()
    return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def _data_files(folder: Path) -> list[str]:
    """Lists the files in the page's folder that a reader may open."""
    kinds = {'.json', '.csv', '.png', '.gif', '.md'}
    return sorted(p.name for p in folder.iterdir() if p.suffix in kinds and not p.name.startswith('.'))
