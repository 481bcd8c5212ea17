"""One optimizer for a whole model: an optax optimizer for its parameters, `center_update` for its centers.

A classifier whose gradient is rows has a third one, `by_rows`.
"""

from functools import partial
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from centerloss_jax._inputs import check_optimizer
from centerloss_jax._rows import RowUpdates
from centerloss_jax._update import Alpha, center_update
from centerloss_jax.nnx import Centers, Table


def with_centers(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    alpha: Alpha = 0.5,
    *,
    classifier: optax.GradientTransformation | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Combines `optimizer` for the parameters with `center_update` for the centers, by `optax.partition`.

    In a tree whose top level has the keys 'params' and 'centers' and no other, the centers are the entry 'centers'. The
    tree may be a dict, a FrozenDict or an nnx.State. In any other tree the centers are the `nnx.Centers` variables and
    the RowUpdates. With a `classifier` there is a third key, 'classifier'; in any other tree its tables are the
    `nnx.Table` variables and the RowUpdates of the kind 'gradient'.

    Put every transform that does arithmetic on gradients inside, such as clipping and accumulation:
    `with_centers(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))`,
    `with_centers(optax.MultiSteps(optax.adam(1e-3), 4))`. In the latter the centers move at every micro-step, and n_j
    counts the examples of that micro-step.

    `optimizer` gets the tree with `optax.MaskedNode()` in the place of the centers. Any optax transform of a tree of
    parameters works. `optax.lookahead` does not, since its parameters are a `LookaheadParams`. A tree of labels for
    `optax.partition` or of masks for `optax.masked` has the keys of the whole tree:
    `with_centers(optax.partition(transforms, {'params': labels, 'centers': 'train'}))` with any label for the centers.

    Args:
      optimizer: optax optimizer of the parameters. It gets no centers and makes no state for them.
      alpha: step of the centers in [0, 1], or an optax schedule. See `center_update`.
      classifier: transform of the tables of a classifier or an embedding whose gradient is rows, such as
        `by_rows(optax.adam(1e-3))`. It has an axis_name and a mesh of its own.
      axis_name: axis of the surrounding `jax.pmap` or `jax.shard_map`. See `center_update`.
      mesh: mesh of Auto axes, under `jax.jit`. See `center_update`.

    Returns:
      An optax transform for `flax.training.train_state.TrainState`, `nnx.Optimizer` or `optax.apply_updates`.
      `optax.tree.get(state, 'step_norm')` reads a field of the `CenterUpdateState` in its state.

    Raises:
      TypeError: if optimizer or classifier is no optax optimizer, or alpha no number and no schedule; from `update`, if
        rows are of the wrong kind, or of none where only the kind tells the tables apart.
      ValueError: if alpha is outside [0, 1]; from `init` and `update`, if nothing in the tree is a center, or nothing
        the classifier.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp, optax
      >>> params = {'params': {'kernel': jnp.ones((2, 2))}, 'centers': jnp.zeros((3, 2))}
      >>> tx = clj.with_centers(optax.sgd(0.1), alpha=0.5)
      >>> state = tx.init(params)
      >>> rows = clj.center_rows(jnp.ones((1, 2)), params['centers'], jnp.array([2]))
      >>> grads = {'params': {'kernel': jnp.ones((2, 2))}, 'centers': rows}
      >>> updates, state = tx.update(grads, state, params)
      >>> optax.apply_updates(params, updates)['centers'].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.25, 0.25]]

    References:
      Wen et al., ECCV 2016, Algorithm 1.
    """
    check_optimizer(optimizer, 'optimizer')
    # MultiSteps is a transform in all but its type.
    transforms: Any = {'params': optimizer, 'centers': center_update(alpha, axis_name=axis_name, mesh=mesh)}
    if classifier is not None:
        check_optimizer(classifier, 'classifier')
        transforms['classifier'] = classifier
    return optax.partition(transforms, partial(_labels, list(transforms)))


def _labels(groups: list[str], tree):
    # Labels in the container that the tree came in: optax matches them as a tree prefix.
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    names = [jax.tree_util.keystr(path, simple=True) for path, _ in children]
    if sorted(names) == sorted(groups):
        return treedef.unflatten(names)
    labels = jax.tree.map(partial(_label, groups), tree, is_leaf=_is_whole)
    missing = [group for group in groups[1:] if group not in jax.tree.leaves(labels)]
    if missing:
        variables = 'centerloss_jax.nnx.Centers' + ', centerloss_jax.nnx.Table' * ('classifier' in groups)
        raise ValueError(
            f'with_centers found no {" and no ".join(missing)}. Pass a tree with the keys '
            f'{" and ".join(map(repr, groups))} at its top and no other, for the parameters and for the gradients '
            f'alike, with the RowUpdates of the step under {" and ".join(groups[1:])}; with nnx.Optimizer pass '
            f'wrt=(nnx.Param, {variables}) and put the rows into the gradients as such variables: '
            f'centerloss_jax.nnx.Centers(rows). The top of this tree has the keys {names}'
        )
    return labels


def _is_whole(node) -> bool:
    return isinstance(node, (nnx.Variable, RowUpdates))


def _label(groups: list[str], leaf) -> str:
    if 'classifier' in groups:
        kind = leaf.kind if isinstance(leaf, RowUpdates) else 'gradient' if isinstance(leaf, Table) else ''
        if kind is None:
            raise TypeError(
                'only the kind of rows tells the tables of this tree apart: pass '
                "RowUpdates(indices, gradient, kind='gradient') for the classifier, and kind='centers' for centers"
            )
        if kind == 'gradient':
            return 'classifier'
    return 'centers' if isinstance(leaf, (Centers, RowUpdates)) else 'params'
