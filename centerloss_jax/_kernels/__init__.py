"""XLA tactics, and the only place that has any: choices by platform, barriers, loops over rows, custom derivatives.

A kernel equals the plain JAX in its docstring, and a test compares both. Kernels save memory traffic.
On a CPU a fresh `[N, D]` array costs more than its arithmetic, and XLA writes one for the operand of a scatter of many
rows. A scatter of one row is an update in place, so a CPU takes the rows of a batch in a loop. An accelerator takes all
rows at once. Without the loops a step of 16,384 examples takes 1.6 to 3.6 times as long on two CPU cores.

The rows of a class are summed before they are added to its center, since thousands of small moves added one by one
would each be rounded. N rows are `values` `[N, D]` times `scale` `[N]`, so that the gradient of the loss, the rows and
the move of the centers share one array. `index` int32 `[N]` is a row of the table or DROPPED.
"""

from centerloss_jax._kernels.groups import class_sizes, sum_in_parts
from centerloss_jax._kernels.log_sum_exp import log_sum_exp_of_others
from centerloss_jax._kernels.loss_and_gradient import loss_and_gradient
from centerloss_jax._kernels.mean_square import mean_square, squared_norms
from centerloss_jax._kernels.sums import (
    add_class_sums,
    class_sums,
    squared_norm_of_sums,
    sums_in_first_rows,
    unique_sums,
)

__all__ = [
    'add_class_sums',
    'class_sizes',
    'class_sums',
    'log_sum_exp_of_others',
    'loss_and_gradient',
    'mean_square',
    'squared_norm_of_sums',
    'squared_norms',
    'sum_in_parts',
    'sums_in_first_rows',
    'unique_sums',
]
