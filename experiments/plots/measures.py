"""Display names, explanations and number formats of the measures in summaries and metrics."""

import math
from typing import Any

from experiments.metrics.held_out import Interval

# Display name and explanation of each measure, in the order of the report.
MEASURES = {
    'test_accuracy': (
        'test accuracy',
        'Share of the test set that the classifier labels correctly.',
    ),
    'nearest_center_accuracy': (
        'nearest-center accuracy',
        'Share of the test set whose nearest center is the center of its own class. The classifier is not used.',
    ),
    'intra_inter_ratio': (
        'intra/inter ratio',
        'Variance of the test features within classes, divided by the variance between classes. It does not depend '
        'on the scale of the features. Smaller means tighter classes: compare arms and epochs by this number.',
    ),
    'auc': (
        'area under the ROC curve',
        'Probability that a pair of one held-out class is more similar than a pair of two held-out classes. '
        '0.5 is chance.',
    ),
    'eer': (
        'equal error rate',
        'Error rate at the threshold where the false accept rate equals the false reject rate.',
    ),
    'tar_at_far_0.1': (
        'TAR at FAR 0.1',
        'True accept rate at the threshold that accepts one in ten pairs of two classes.',
    ),
    'tar_at_far_0.01': (
        'TAR at FAR 0.01',
        'True accept rate at the threshold that accepts one in a hundred pairs of two classes.',
    ),
    'tar_at_far_0.001': (
        'TAR at FAR 0.001',
        'True accept rate at the threshold that accepts one in a thousand pairs of two classes.',
    ),
    'tar_at_far_0.0001': (
        'TAR at FAR 0.0001',
        'True accept rate at the threshold that accepts one in ten thousand pairs of two classes.',
    ),
    'rank_1': (
        'rank-1',
        'Share of the held-out examples whose most similar other example has the same class. Also called CMC rank-1, '
        'precision at 1 and recall at 1.',
    ),
    'rank_5': (
        'rank-5',
        'Share of the held-out examples that have one of their class among the five most similar ones (CMC rank-5).',
    ),
    'map': (
        'mAP',
        'Mean average precision: all other held-out examples are ranked by similarity. The precision at the rank of '
        'each example of the class is averaged over these, then over the queries.',
    ),
    'r_precision': (
        'R-precision',
        'For a class with R other examples, the share of it among the R most similar examples, averaged over the '
        'queries.',
    ),
    'map_at_r': (
        'MAP@R',
        'As mAP, but ranks beyond R, the number of other examples of the class, count as misses.',
    ),
    'queries_left_out': (
        'queries left out',
        'Held-out examples that are alone in their class. The measures of retrieval leave them out as queries.',
    ),
    'verification_accuracy': (
        'verification accuracy',
        'Share of correct decisions at the best threshold, with pairs of one class and pairs of two classes weighted '
        'equally.',
    ),
    'unknown_auroc': (
        'AUROC of unknown classes',
        'Probability that an example of a held-out class is farther from its nearest center than a test example of a '
        'known class. 0.5 is chance.',
    ),
    'collapsed': (
        'collapsed',
        'The features carry no information about the class. The softmax loss is that of a guess, ln C (2.303 for 10 '
        'classes). The intra/inter ratio is above 2, or undefined if all features are equal. Use a smaller weight of '
        'the center loss.',
    ),
    'train_seconds': (
        'train seconds',
        'Time of all training steps, without compilation and evaluation.',
    ),
    'train_accuracy': (
        'train accuracy',
        'Share of the train set that the classifier labels correctly.',
    ),
    'softmax_loss': (
        'softmax loss',
        'Mean cross-entropy over the examples.',
    ),
    'center_loss': (
        'center loss',
        'Mean squared distance of a feature to the center of its class, before the weight. It may rise while training '
        'goes well, because the features grow. Compare arms by the intra/inter ratio.',
    ),
    'gradient_norm': (
        'gradient norm',
        'Norm of the gradient of the total loss with respect to the parameters of the network, without the centers. '
        'Mean over the steps of an epoch.',
    ),
    'center_step_norm': (
        'center step norm',
        'Norm of the change of the centers in a step, mean over the steps of an epoch. If it is always 0, the centers '
        'are not updated.',
    ),
    'rows_dropped': (
        'rows dropped',
        'Examples that moved no center, because a feature was not finite or the label was too large.',
    ),
}


def measure_name(measure: str) -> str:
    """Returns the display name of a measure."""
    return MEASURES[measure][0] if measure in MEASURES else measure.replace('_', ' ')


def measure_order(measure: str) -> int:
    """Returns a sort key that puts measures in the order of `MEASURES`, and all others after them."""
    return [*MEASURES, measure].index(measure)


def seeds_note(seeds: int) -> str:
    """Returns a sentence on what a number over seeds is."""
    return f'Means over {seeds} seeds with 95 % intervals.' if seeds > 1 else 'One seed.'


def format_value(value: Any, measure: str = '', *, difference: bool = False) -> str:
    """Formats a value for a reader.

    Args:
        value: A number, an interval, or anything else.
        measure: The measure of a number, which decides whether it is a percentage.
        difference: Whether a number is a difference: that of two percentages is in points.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '\N{EN DASH}'
    unit = 'points' if difference else '%'
    if isinstance(value, Interval):
        if math.isnan(value.half_width):
            return format_value(value.mean, measure, difference=difference)
        if measure.endswith('accuracy'):
            return f'{100 * value.mean:.2f} ± {100 * value.half_width:.2f} {unit}'
        half = value.half_width
        # Digits below those of the interval say nothing. Adding 0 makes a 0 of -0.
        mean = round(value.mean, 1 - math.floor(math.log10(half))) if 0 < half < math.inf else value.mean
        return f'{mean + 0.0:.4g} ± {half:.2g}'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if measure.endswith('accuracy'):
        return f'{100 * value:.4g} {unit}'
    if isinstance(value, float):
        return f'{value:.0f}' if 1e4 <= abs(value) < 1e6 else f'{value:.4g}'
    if isinstance(value, list | tuple):
        return ', '.join(format_value(entry) for entry in value)
    return str(value)
