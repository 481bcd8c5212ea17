"""The step of a classifier in PyTorch: over all classes, and over a sample in three forms.

The sample has every class of the batch and others at random, by the top-k over all classes that Partial FC uses (An et
al., CVPR 2022). All but one form move the table by SGD with momentum.
"""

from collections.abc import Callable
from typing import Any

from experiments.bench.ours_classifier import num_sampled
from experiments.bench.problem import MOMENTUM, RATE, Implementation, Problem
from experiments.bench.pytorch import DENSE_LIMIT, device_kind, repeat


def full_linear(torch: Any, problem: Problem) -> Implementation | None:
    """Computes `linear` and `cross_entropy` over all classes, with a dense gradient."""
    if problem.batch_size * problem.num_classes * 4 > DENSE_LIMIT:
        return None
    table, x, labels = _start_classifier(torch, problem)
    functional = torch.nn.functional
    return _by_sgd(torch, table, x, lambda: functional.cross_entropy(functional.linear(x, table), labels))


def sampled_dense(torch: Any, problem: Problem, share: float) -> Implementation:
    """Differentiates `table[classes]`, with a dense gradient. Momentum moves rows outside of the sample too."""
    return _by_sgd(torch, *_sampled(torch, problem, share, lambda classes, table: table[classes]))


def sampled_sparse(torch: Any, problem: Problem, share: float) -> Implementation:
    """Uses `F.embedding(sparse=True)`, with a sparse gradient. SGD has no momentum: a sparse one would grow."""
    embed = torch.nn.functional.embedding
    lookup = lambda classes, table: embed(classes, table, sparse=True)  # noqa: E731
    return _by_sgd(torch, *_sampled(torch, problem, share, lookup), momentum=0.0)


def partial_fc(torch: Any, problem: Problem, share: float) -> Implementation:
    """Moves the sampled rows and their momentum by hand, as Partial FC does. The most like `by_rows`."""
    table, x, labels = _start_classifier(torch, problem)
    table = table.detach()
    momentum = torch.zeros_like(table)

    def step():
        x.grad = None
        classes = _sample(torch, labels, problem, share)
        rows = table[classes].requires_grad_()
        _cross_entropy(torch, x, rows, classes, labels).backward()
        moving = momentum[classes].mul_(MOMENTUM).add_(rows.grad)
        momentum[classes] = moving
        table[classes] = rows.detach().sub_(moving, alpha=RATE)

    return _measured(torch, step)


SAMPLED_FORMS = {
    'torch, dense gradient': sampled_dense,
    'torch, sparse SGD': sampled_sparse,
    'torch, Partial FC': partial_fc,
}


def _start_classifier(torch: Any, problem: Problem) -> tuple[Any, Any, Any]:
    device = device_kind(torch)
    x, labels = (torch.from_numpy(array).to(device) for array in problem.batch())
    table = torch.randn(problem.num_classes, problem.feature_dim, device=device).mul_(0.01)
    return torch.nn.Parameter(table), x.requires_grad_(), labels.long()


def _sample(torch: Any, labels: Any, problem: Problem, share: float) -> Any:
    priority = torch.rand(problem.num_classes, device=labels.device)
    priority[labels] = 2.0
    return torch.topk(priority, num_sampled(problem, share)).indices.sort().values


def _cross_entropy(torch: Any, x: Any, rows: Any, classes: Any, labels: Any) -> Any:
    logits = torch.nn.functional.linear(x, rows)
    return torch.nn.functional.cross_entropy(logits, torch.searchsorted(classes, labels))


def _sampled(torch: Any, problem: Problem, share: float, lookup: Callable) -> tuple[Any, Any, Callable]:
    table, x, labels = _start_classifier(torch, problem)

    def loss():
        classes = _sample(torch, labels, problem, share)
        return _cross_entropy(torch, x, lookup(classes, table), classes, labels)

    return table, x, loss


def _by_sgd(torch: Any, table: Any, x: Any, loss: Callable, momentum: float = MOMENTUM) -> Implementation:
    optimizer = torch.optim.SGD([table], lr=RATE, momentum=momentum)

    def step():
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # so that the gradient counts as a temporary, as in the other arms

    return _measured(torch, step)


def _measured(torch: Any, step: Callable) -> Implementation:
    step()  # makes the momentum
    return repeat(torch, step)._replace(temporary_bytes=_temporary_bytes(torch, step))


def _temporary_bytes(torch: Any, step: Callable) -> int:
    """Returns how much a step allocates at most at a time. On a CPU what an operation frees itself is not seen."""
    if device_kind(torch) == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    allocated = most = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.end):
        allocated += event.self_cpu_memory_usage
        most = max(most, allocated)
    return most
