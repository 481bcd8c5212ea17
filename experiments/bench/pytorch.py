"""The step of the benchmark in PyTorch, in five forms that its users write, and the training step of the toy.

PyTorch is optional. Without it the benchmark says so and measures the other arms.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench.problem import ALPHA, Implementation, Problem
from experiments.bench.timing import on_cpu

DENSE_LIMIT = 2**31  # bytes of a B x C matrix; the dense form needs several of them


def installed() -> Any | None:
    """Returns the torch module, or None if it is not installed."""
    try:
        return importlib.import_module('torch')
    except ImportError:
        return None


def _counts(torch: Any, labels: Any) -> Any:
    """Returns n_j of the class of each example, in O(B log B)."""
    _, index, count = torch.unique(labels, return_inverse=True, return_counts=True)
    return count[index]


def device_kind(torch: Any) -> str:
    """Returns the kind of device that JAX uses."""
    return 'cuda' if torch.cuda.is_available() and not on_cpu() else 'cpu'


def repeat(torch: Any, step: Callable) -> Implementation:
    """Returns an implementation whose steps are calls of `step`."""

    def steps():
        while True:
            yield step()

    cuda = device_kind(torch) == 'cuda'
    return Implementation(steps(), lambda _: torch.cuda.synchronize() if cuda else None)


def _problem(torch: Any, problem: Problem) -> tuple[Any, Any, Any]:
    x, labels = (torch.from_numpy(array).to(device_kind(torch)) for array in problem.batch())
    return torch.ones((problem.num_classes, problem.feature_dim), device=device_kind(torch)), x, labels.long()


def dense(torch: Any, problem: Problem) -> Implementation | None:
    """Computes all B x C distances, masked by the labels, with SGD for the centers: the best-known PyTorch module."""
    if problem.batch_size * problem.num_classes * 4 > DENSE_LIMIT:
        return None
    table, x, labels = _problem(torch, problem)
    classes = torch.arange(problem.num_classes, device=table.device)

    def loss(x, centers):
        products = x.pow(2).sum(1, keepdim=True) + centers.pow(2).sum(1) - 2 * x @ centers.T
        return (products * (labels[:, None] == classes)).clamp(1e-12, 1e12).sum() / len(x)

    return _with_sgd(torch, table, x, loss)


def autograd(torch: Any, problem: Problem) -> Implementation:
    """Differentiates `centers[labels]`, with SGD for the centers and a dense gradient."""
    table, x, labels = _problem(torch, problem)
    return _with_sgd(torch, table, x, lambda x, centers: (x - centers[labels]).pow(2).sum(1).mean())


def sparse(torch: Any, problem: Problem) -> Implementation:
    """Uses `F.embedding(sparse=True)`, with SGD for the centers and a sparse gradient."""
    table, x, labels = _problem(torch, problem)
    embed = torch.nn.functional.embedding
    return _with_sgd(torch, table, x, lambda x, centers: (x - embed(labels, centers, sparse=True)).pow(2).sum(1).mean())


def _with_sgd(torch: Any, table: Any, x: Any, loss: Callable) -> Implementation:
    centers, x = torch.nn.Parameter(table), x.requires_grad_()
    optimizer = torch.optim.SGD([centers], lr=ALPHA)

    def step():
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        loss(x, centers).backward()
        optimizer.step()

    return repeat(torch, step)


def _eq_4(table: Any, x: Any, labels: Any, counts: Any) -> tuple[Any, Any]:
    difference = x - table[labels]
    table.index_add_(0, labels, (ALPHA / (1 + counts.float()))[:, None] * difference)
    return difference.pow(2).sum(1).mean(), 2 / len(x) * difference


def eager(torch: Any, problem: Problem) -> Implementation:
    """Computes Eq. 4 without autograd, by `index_add_`."""
    table, x, labels = _problem(torch, problem)
    return repeat(torch, lambda: _eq_4(table, x, labels, _counts(torch, labels)))


def compiled(torch: Any, problem: Problem) -> Implementation:
    """Computes Eq. 4 under `torch.compile`. The counts stay outside, because the size of `unique` depends on data."""
    table, x, labels = _problem(torch, problem)
    compiled_eq_4 = torch.compile(_eq_4)
    return repeat(torch, lambda: compiled_eq_4(table, x, labels, _counts(torch, labels)))


FORMS = {
    'torch, B x C matrix': dense,
    'torch, autograd': autograd,
    'torch, sparse SGD': sparse,
    'torch, index_add_': eager,
    'torch, compiled': compiled,
}


def toy_step(
    torch: Any, images: np.ndarray, labels: np.ndarray, num_classes: int, learning_rate: float
) -> Implementation:
    """Trains the toy's small network on one batch, with Adam for the network and SGD for the centers."""
    layers, channels = [], images.shape[-1]
    for width in (32, 64):
        for _ in range(2):
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.PReLU()]
            channels = width
        layers.append(torch.nn.MaxPool2d(2))
    pixels = channels * (images.shape[1] // 4) * (images.shape[2] // 4)
    device = device_kind(torch)
    trunk = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(pixels, 2)).to(device)
    classifier = torch.nn.Linear(2, num_classes, bias=False, device=device)
    centers = torch.nn.Parameter(torch.zeros(num_classes, 2, device=device))
    adam = torch.optim.Adam([*trunk.parameters(), *classifier.parameters()], lr=learning_rate)
    sgd = torch.optim.SGD([centers], lr=ALPHA)
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)

    def step():
        adam.zero_grad(set_to_none=True)
        sgd.zero_grad(set_to_none=True)
        features = trunk(x.permute(0, 3, 1, 2).float() / 127.5 - 1)
        softmax = torch.nn.functional.cross_entropy(classifier(features), y)
        (softmax + 0.1 * (features - centers[y]).pow(2).sum(1).mean()).backward()
        adam.step()
        sgd.step()

    return repeat(torch, step)
