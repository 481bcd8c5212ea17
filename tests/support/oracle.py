"""The formulas of the library in NumPy float64 with explicit loops.

It shares no code with the library. Every example, class and feature has its own index, so that a wrong axis, count or
mask would be visible.

An example is left out where `where` is False or its label is negative. `weights` have the shape of `labels`
or of `x`. Labels >= C are not defined here: the tests remove them first.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class ClassStatistics:
    count: np.ndarray  # [C]
    mean: np.ndarray  # [C, D], zero for a class without examples
    intra: float
    inter: float


def _float64(a):
    # Through float32 first: NumPy has no bfloat16 of its own, and every narrower type fits.
    a = np.asarray(a)
    return a if a.dtype == np.float64 else a.astype(np.float32).astype(np.float64)


def _counted(labels, where):
    """Yields the index of each example that is not left out."""
    labels = np.asarray(labels)
    for position in np.ndindex(labels.shape):
        if (where is None or where[position]) and labels[position] >= 0:
            yield position


def _element_weights(x, weights):
    """Returns weights of shape [...] or [..., D] as [..., D]."""
    if weights is None:
        return np.ones(x.shape)
    weights = _float64(weights)
    if weights.shape == x.shape:
        return weights
    assert weights.shape == x.shape[:-1]
    spread = np.empty(x.shape)
    for d in range(x.shape[-1]):
        spread[..., d] = weights
    return spread


def per_example(x, centers, labels, *, where=None, weights=None):
    """Returns w_i |x_i - c_{y_i}|² in the shape of `labels`, and 0 for an example that is left out."""
    x, centers, labels = _float64(x), _float64(centers), np.asarray(labels)
    weights = _element_weights(x, weights)
    out = np.zeros(labels.shape)
    for i in _counted(labels, where):
        for d in range(x.shape[-1]):
            out[i] += weights[i][d] * (x[i][d] - centers[labels[i]][d]) ** 2
    return out


def center_loss(x, centers, labels, *, where=None, weights=None):
    """Returns the mean of `per_example` over the examples that count; 0 if none does."""
    count = len(list(_counted(labels, where)))
    return per_example(x, centers, labels, where=where, weights=weights).sum() / count if count else 0.0


def center_loss_gradients(x, centers, labels, *, where=None, weights=None):
    """Returns d center_loss / d (x, centers, element weights), the last in the shape of `x`."""
    x, centers, labels = _float64(x), _float64(centers), np.asarray(labels)
    weights = _element_weights(x, weights)
    count = len(list(_counted(labels, where)))
    for_x, for_centers, for_weights = np.zeros(x.shape), np.zeros(centers.shape), np.zeros(x.shape)
    for i in _counted(labels, where):
        for d in range(x.shape[-1]):
            difference = x[i][d] - centers[labels[i]][d]
            for_x[i][d] = 2 * weights[i][d] * difference / count
            for_centers[labels[i]][d] -= 2 * weights[i][d] * difference / count
            for_weights[i][d] = difference**2 / count
    return for_x, for_centers, for_weights


def center_rows(x, centers, labels, *, where=None, weights=None):
    """Returns Σ_{i: y_i = j} w_i (c_j - x_i) as a dense [C, D] array."""
    x, centers, labels = _float64(x), _float64(centers), np.asarray(labels)
    weights = _element_weights(x, weights)
    out = np.zeros(centers.shape)
    for i in _counted(labels, where):
        for d in range(x.shape[-1]):
            out[labels[i]][d] += weights[i][d] * (centers[labels[i]][d] - x[i][d])
    return out


def add_rows(table, indices, values):
    """Adds each row of `values` to the row of `table` at its index, and drops rows whose index is outside the table."""
    out = _float64(table).copy()
    for index, value in zip(indices, _float64(values), strict=True):
        if 0 <= int(index) < len(out):
            for d in range(out.shape[1]):
                out[int(index)][d] += value[d]
    return out


def center_update(x, centers, labels, alpha, *, where=None, weights=None):
    """Returns the centers after Eq. 4: c_j - alpha · Σ_{i: y_i = j} w_i (c_j - x_i) / (1 + n_j).

    n_j counts examples, whatever their weights. An example with a feature that is not finite does not count.
    """
    x, centers, labels = _float64(x), _float64(centers), np.asarray(labels)
    weights = _element_weights(x, weights)
    new = centers.copy()
    examples_of = [[] for _ in centers]
    for i in _counted(labels, where):
        if all(np.isfinite(feature) for feature in x[i]):
            examples_of[labels[i]].append(i)
    for j in range(len(centers)):
        for d in range(centers.shape[1]):
            move = sum(weights[i][d] * (centers[j][d] - x[i][d]) for i in examples_of[j])
            new[j][d] = centers[j][d] - alpha * move / (1 + len(examples_of[j]))
    return new


def nearest_center(x, centers):
    """Returns the index of each example's nearest center, the lowest of equal ones, and its squared distance."""
    x, centers = _float64(x), _float64(centers)
    labels = np.zeros(x.shape[:-1], np.int64)
    distances = np.full(x.shape[:-1], np.inf)
    for i in np.ndindex(labels.shape):
        for j in range(len(centers)):
            distance = 0.0
            for d in range(x.shape[-1]):
                distance += (x[i][d] - centers[j][d]) ** 2
            if distance < distances[i]:
                labels[i], distances[i] = j, distance
    return labels, distances


def class_statistics(x, labels, num_classes, *, where=None):
    """Returns counts, means, intra = Σ_i |x_i - μ_{y_i}|² / (N - K) and inter = (1/N) Σ_j n_j |μ_j - μ|²."""
    x, labels = _float64(x), np.asarray(labels)
    counted = list(_counted(labels, where))
    count, mean = np.zeros(num_classes, np.int64), np.zeros((num_classes, x.shape[-1]))
    total = np.zeros(x.shape[-1])
    for i in counted:
        count[labels[i]] += 1
        mean[labels[i]] += x[i]
        total += x[i]
    for j in range(num_classes):
        if count[j]:
            mean[j] /= count[j]
    intra = inter = 0.0
    for i in counted:
        for d in range(x.shape[-1]):
            intra += (x[i][d] - mean[labels[i]][d]) ** 2
    for j in range(num_classes):
        for d in range(x.shape[-1]):
            if count[j]:
                inter += count[j] * (mean[j][d] - total[d] / len(counted)) ** 2
    freedom = len(counted) - len([j for j in range(num_classes) if count[j]])
    return ClassStatistics(count, mean, intra / freedom if freedom else np.nan, inter / len(counted))


def reference_loss(x, centers, labels, dtype):
    """Returns the loss of the PyTorch code: the [B, C] matrix |x|² + |c|² - 2 x·c, masked, clamped, averaged.

    The clamp adds (C - 1)·1e-12 for each example. In float32 the expanded square loses the digits of large norms.
    """
    x, centers = np.asarray(x, dtype), np.asarray(centers, dtype)
    matrix = np.empty((len(x), len(centers)), dtype)
    for i in range(len(x)):
        for j in range(len(centers)):
            expanded = (x[i] ** 2).sum() + (centers[j] ** 2).sum() - 2 * np.dot(x[i], centers[j])
            matrix[i, j] = np.clip(expanded * dtype(labels[i] == j), 1e-12, 1e12)
    return matrix.sum() / dtype(len(x))


def class_logit(x, row, is_own):
    """Returns x·w, and its derivatives for x and for w."""
    return sum(x[d] * row[d] for d in range(len(x))), row, x


def margin_logit(x, row, is_own, *, scale=64.0, angular_margin=0.0, additive_margin=0.4, straight_through=False):
    """Returns s·cos θ, of the example's own class s·(cos(θ + m) - a), and its derivatives for x and for w."""
    x_norm, row_norm = (np.sqrt(sum(number**2 for number in v)) for v in (x, row))
    if x_norm == 0 or row_norm == 0:
        cosine, for_x, for_row = 0.0, np.zeros(len(x)), np.zeros(len(x))
    else:
        cosine = sum(x[d] * row[d] for d in range(len(x))) / (x_norm * row_norm)
        for_x = (row / row_norm - cosine * x / x_norm) / x_norm
        for_row = (x / x_norm - cosine * row / row_norm) / row_norm
    value, derivative = cosine, 1.0
    if is_own:
        theta = np.arccos(np.clip(cosine, -1, 1))
        if theta + angular_margin > np.pi:
            value = cosine - angular_margin * np.sin(angular_margin)
        else:
            value = np.cos(theta + angular_margin)
            if angular_margin and not straight_through and for_x.any():
                derivative = np.sin(theta + angular_margin) / np.sin(theta)
        value -= additive_margin
    return scale * value, scale * derivative * for_x, scale * derivative * for_row


def distance_logit(x, row, is_own, *, temperature=1.0, margin=0.0):
    """Returns -|x - w|²/T, of the example's own class times 1 + m, and its derivatives for x and for w."""
    factor = (1 + margin if is_own else 1.0) / temperature
    square = sum((x[d] - row[d]) ** 2 for d in range(len(x)))
    return -factor * square, -2 * factor * (x - row), 2 * factor * (x - row)


def softmax(logit, x, table, labels, *, where=None, **options):
    """Returns the mean cross-entropy over the examples that count, and its gradients for x and for the table.

    `logit` is one of the three functions above. Every class has its own logit.
    """
    x, table, labels = _float64(x), _float64(table), np.asarray(labels)
    loss, for_x, for_table = 0.0, np.zeros(x.shape), np.zeros(table.shape)
    counted = list(_counted(labels, where))
    for i in counted:
        rows = [logit(x[i], table[j], j == labels[i], **options) for j in range(len(table))]
        largest = max(value for value, _, _ in rows)
        total = sum(np.exp(value - largest) for value, _, _ in rows)
        loss += (largest + np.log(total) - rows[labels[i]][0]) / len(counted)
        for j, (value, for_features, for_row) in enumerate(rows):
            surplus = (np.exp(value - largest) / total - (j == labels[i])) / len(counted)
            for_x[i] += surplus * for_features
            for_table[j] += surplus * for_row
    return loss, for_x, for_table
