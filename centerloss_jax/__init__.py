"""Class centers for JAX: the center loss and the state behind it.

>>> import centerloss_jax as clj
>>> import jax.numpy as jnp
>>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [2.0, 2.0]])
>>> centers = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
>>> clj.center_loss(x, centers, jnp.array([0, 2, 1, 0])).item()
4.75
"""

from centerloss_jax import linen, nnx
from centerloss_jax._by_rows import ByRowsState, by_rows
from centerloss_jax._inputs import check_labels
from centerloss_jax._loss import center_loss, center_loss_and_rows, center_rows
from centerloss_jax._nearest import nearest_center
from centerloss_jax._optimizer import with_centers
from centerloss_jax._rows import RowUpdates, concatenate_rows
from centerloss_jax._sampling import sample_classes
from centerloss_jax._softmax import class_softmax, distance_softmax, margin_softmax
from centerloss_jax._softmax_rows import class_softmax_and_rows, distance_softmax_and_rows, margin_softmax_and_rows
from centerloss_jax._statistics import ClassStatistics, class_statistics
from centerloss_jax._tables import check_replicas, shard_centers, unshard_centers
from centerloss_jax._update import CenterUpdateState, center_update

__version__ = '0.1.0'

__all__ = [
    'ByRowsState',
    'CenterUpdateState',
    'ClassStatistics',
    'RowUpdates',
    'by_rows',
    'center_loss',
    'center_loss_and_rows',
    'center_rows',
    'center_update',
    'check_labels',
    'check_replicas',
    'class_softmax',
    'class_softmax_and_rows',
    'class_statistics',
    'concatenate_rows',
    'distance_softmax',
    'distance_softmax_and_rows',
    'linen',
    'margin_softmax',
    'margin_softmax_and_rows',
    'nearest_center',
    'nnx',
    'sample_classes',
    'shard_centers',
    'unshard_centers',
    'with_centers',
]
