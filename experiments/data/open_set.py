"""A dataset divided by classes: some are trained on, the others are only verified."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from experiments.data.arrays import Standardization
from experiments.data.image_files import all_numbers, some
from experiments.data.load import Dataset
from experiments.data.splits import Split

# Share of the classes that are held out by default.
FRACTION = 0.3

# Limit on the examples of the verified classes, since the number of pairs is its square.
LIMIT = 4000


@dataclasses.dataclass(frozen=True)
class OpenSet:
    """Known classes as a dataset of their own, and examples of unknown ones, with the labels of the whole set."""

    known: Dataset
    unknown: Split


def divide(data: Dataset, held_out: str = '') -> OpenSet:
    """Divides a dataset by classes. The notes of the known part describe the division.

    Args:
        data: the whole dataset.
        held_out: the unknown classes: names such as `cat,dog`, numbers such as `7-9` or `0,4-6`, or a fraction such as
            `0.3`, the last ones. By default those of the test split if the train split has none of them, or else the
            last 0.3. Where all names are numbers, a number is a name.

    Raises:
        ValueError: if it names no such classes, leaves fewer than two on either side, or no image to test on.
    """
    notes = []
    classes = np.arange(data.num_classes)
    train, test = data.train.labels, data.test.labels
    trained = np.isin(classes, train)
    by_split = not trained[test[test >= 0]].any()
    if by_split and not held_out:
        unknown = np.isin(classes, test)
    else:
        unknown = _parsed(held_out or str(FRACTION), data.class_names)
    known = trained & ~unknown
    for what, chosen in (('known', known), ('held-out', unknown)):
        if chosen.sum() < 2:
            raise ValueError(f'--held-out must leave two {what} classes or more, got {chosen.sum()} of {len(classes)}')

    numbers = np.where(known, np.cumsum(known) - 1, -1)
    train_places, test_places = (np.flatnonzero((own >= 0) & known[own]) for own in (train, test))
    test_split = data.test
    if not len(test_places):
        notes.append(
            f'{data.name} has no test {data.kind} of known classes; a fifth of each class, at least one, was held out'
        )
        test_split, test_places = data.train, _fifth(train_places, train[train_places])
        if not len(test_places):
            raise ValueError(f'{data.name} has no known class with two {data.kind}, so that none is left to test on')
        train_places = np.setdiff1d(train_places, test_places)
    names = tuple(name for name, is_known in zip(data.class_names, known, strict=True) if is_known)
    known_part = dataclasses.replace(
        data,
        class_names=names,
        train=data.train.part(train_places, numbers),
        test=test_split.part(test_places, numbers),
    )
    verified = _limited(unknown, np.concatenate([train, test]))
    if verified.sum() < unknown.sum():
        notes.append(
            f'{verified.sum()} of the {unknown.sum()} held-out classes are verified, of {LIMIT} {data.kind} or fewer'
        )
    both = [(data.train, train), (data.test, test)]
    parts = [split.take(np.flatnonzero((own >= 0) & verified[own])) for split, own in both]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    notes.append(
        f'{len(names)} classes are trained on, {len(known_part.train)} {data.kind}; {verified.sum()} others are '
        f'verified ({some([data.class_names[label] for label in np.flatnonzero(verified)])}), {len(labels)} {data.kind}'
    )
    held = Split(images, labels)
    if data.standardization:  # by the known classes alone, since the others must be new to the network
        own = Standardization.of(known_part.train.take(range(len(known_part.train)))[0])
        known_part = dataclasses.replace(
            known_part,
            train=own.split(known_part.train),
            test=own.split(known_part.test),
            standardization=data.standardization.then(own),
        )
        held = own.split(held)
    return OpenSet(dataclasses.replace(known_part, notes=tuple(notes)), held)


def _parsed(held_out: str, names: Sequence[str]) -> np.ndarray:
    """Returns which classes are held out, bool `[C]`."""
    chosen = np.zeros(len(names), bool)
    if held_out not in names and re.fullmatch(r'0?\.\d+', held_out):
        chosen[len(names) - round(float(held_out) * len(names)) :] = True
        return chosen
    places = {name: place for place, name in enumerate(names)}
    numbers = dict(zip(map(int, names) if all_numbers(names) else range(len(names)), range(len(names)), strict=True))
    for part in [held_out] if held_out in names else map(str.strip, held_out.split(',')):
        if part in places:
            chosen[places[part]] = True
            continue
        bounds = re.fullmatch(r'(\d+)(?:-(\d+))?', part)
        first = numbers.get(int(bounds[1]), len(names)) if bounds else len(names)
        last = numbers.get(int(bounds[2] or bounds[1]), -1) if bounds else -1
        if not first <= last:
            raise ValueError(
                f'--held-out must be names of classes, numbers such as 7-9 or 0,4-6 of the {len(names)} classes '
                f'({some(names)}), or a fraction such as 0.3, got {held_out}'
            )
        chosen[first : last + 1] = True
    return chosen


def _fifth(places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns every fifth example of each class, or the last one of two to four."""
    classes = [places[labels == label] for label in np.unique(labels)]
    return np.concatenate([own[4::5] if len(own) >= 5 else own[1:][-1:] for own in classes])


def _limited(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns as many of these classes as fit into the limit, two or more, in an order that every run repeats."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    order = np.random.default_rng(0).permutation(np.flatnonzero(classes))
    fitting = max(2, int((np.cumsum(counts[order]) <= LIMIT).sum()))
    return np.isin(np.arange(len(classes)), order[:fitting])
