"""One page that holds all of a run: numbers, pictures, curves, settings, and how to read and repeat them.

It is one file without scripts or anything from the network, so it can be mailed, or put away with the
results, and still opens. It knows no experiment: what a number means is said once, in `MEASURES`, by the name
under which summaries and metrics carry it. The layout is in `report.html.jinja`.
"""

import base64
import math
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from experiments.launch.atomic_files import write_text
from experiments.plots import charts
from experiments.train.metrics import Interval

# Name and meaning, in the order in which a page shows them.
MEASURES = {
    'test_accuracy': (
        'test accuracy',
        'Share of the test set that the last layer classifies rightly.',
    ),
    'nearest_center_accuracy': (
        'nearest-center accuracy',
        'Share of the test set that lies nearest to the center of its own class: what the features are worth '
        'without the last layer.',
    ),
    'intra_inter_ratio': (
        'intra/inter ratio',
        'Variance of the test features within the classes over the variance between them. It has no scale, '
        'so it can be compared between arms and epochs. Smaller is tighter: this is the number to look at.',
    ),
    'auc': (
        'area under the ROC curve',
        'Chance that a pair of the same held-out class is more alike than a pair of two of them: 0.5 is guessing.',
    ),
    'eer': (
        'equal error rate',
        'Share of the pairs that are decided wrongly at the threshold where as many are falsely accepted as rejected.',
    ),
    'tar_at_far_0.1': (
        'TAR at FAR 0.1',
        'Share of like pairs that are accepted where one unlike pair in ten is. The next two are stricter.',
    ),
    'tar_at_far_0.01': ('TAR at FAR 0.01', 'The same, where one unlike pair in a hundred is accepted.'),
    'tar_at_far_0.001': ('TAR at FAR 0.001', 'The same, where one unlike pair in a thousand is accepted.'),
    'recall_at_1': (
        'recall at 1',
        'Share of the held-out examples whose most similar other one is of their class.',
    ),
    'verification_accuracy': (
        'verification accuracy',
        'Share of the pairs that the best threshold decides rightly, with as many like as unlike ones.',
    ),
    'unknown_auroc': (
        'AUROC of unknown classes',
        'Chance that an example of a held-out class is farther from its nearest center than a test example of a known '
        'class is: how well the distance tells that an image is of no known class.',
    ),
    'collapsed': (
        'collapsed',
        'The features tell nothing of the class: the softmax loss stays at the logarithm of the number of classes '
        '(2.303 for 10), and the ratio is above 2 or, where all features coincide, undefined. The remedy is a smaller '
        'weight of the center loss.',
    ),
    'train_accuracy': (
        'train accuracy',
        'Share of the train set that the last layer classifies rightly.',
    ),
    'softmax_loss': (
        'softmax loss',
        'Mean cross-entropy of an example.',
    ),
    'center_loss': (
        'center loss',
        'Mean squared distance of an example to the center of its class, before it is weighted. It may rise '
        'while all goes well: features grow, and distances grow with them. Judge by the ratio.',
    ),
    'gradient_norm': (
        'gradient norm',
        'Length of the gradient of the whole loss for the parameters of the network, the mean over the steps of an '
        'epoch. Centers have no part in it.',
    ),
    'center_step_norm': (
        'center step norm',
        'How far the centers moved in a step. If it is 0 throughout, they are not being updated.',
    ),
    'rows_left_out': (
        'rows left out',
        'Examples that the centers did not follow: features were not finite, or a label named no class.',
    ),
}


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
) -> None:
    """Writes the page, and links to the data files and pictures that lie beside it.

    Args:
      path: The HTML file to write.
      title: What was run.
      summary: Measures of each arm, `{arm: {measure: value}}`. Other entries are shown below the table.
      metrics: Rows with an `epoch`, an `arm`, and numbers or None, each drawn as a curve.
      pictures: Image files by caption.
      config: Settings. Entries that are mappings themselves (such as versions) become a table of their own.
      lead: A sentence or two on what was compared.
      command: What to type to make the results again.
    """
    arms = {name: values for name, values in summary.items() if isinstance(values, Mapping)}
    drawn = charts.charts(metrics)
    measures = _in_order({key for values in arms.values() for key in values})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=_shown, named=_named, data_uri=_data_uri)
    page = environment.get_template('report.html.jinja').render(
        title=title,
        lead=lead,
        command=command,
        arms=arms,
        measures=measures,
        collapsed=[name for name, values in arms.items() if values.get('collapsed')],
        remarks={key: value for key, value in summary.items() if key not in arms},
        pictures=pictures,
        charts=sorted(drawn, key=lambda chart: _rank(chart.column)),
        drawing=charts,
        meanings={
            key: MEASURES[key][1] for key in _in_order({*measures, *(c.column for c in drawn)}) if key in MEASURES
        },
        settings={key: value for key, value in config.items() if not isinstance(value, Mapping)},
        tables={key: value for key, value in config.items() if isinstance(value, Mapping)},
        files=_files_beside(path),
    )
    write_text(path, page)


def _rank(measure: str) -> int:
    return [*MEASURES, measure].index(measure)


def _in_order(measures: set[str]) -> list[str]:
    return sorted(sorted(measures), key=_rank)


def _named(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.replace('_', ' ')


def _shown(value: Any, measure: str = '') -> str:
    """A value as people read it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '\N{EN DASH}'
    if isinstance(value, Interval):
        if math.isnan(value.half_width):
            return _shown(value.mean, measure)
        if measure.endswith('accuracy'):
            return f'{100 * value.mean:.2f} ± {100 * value.half_width:.2f} %'
        return f'{value.mean:.4g} ± {value.half_width:.2g}'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if measure.endswith('accuracy'):
        return f'{100 * value:.4g} %'
    if isinstance(value, float):
        return f'{value:.0f}' if 1e4 <= abs(value) < 1e6 else f'{value:.4g}'
    if isinstance(value, list | tuple):
        return ', '.join(_shown(v) for v in value)
    return str(value)


def _data_uri(picture: Path) -> str:
    kind, _ = mimetypes.guess_type(picture)
    return f'data:{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}'


def _files_beside(path: Path) -> list[str]:
    kinds = {'.json', '.csv', '.png', '.gif', '.md'}
    return sorted(p.name for p in path.parent.iterdir() if p.suffix in kinds and not p.name.startswith('.'))
