"""An optax optimizer, run on the rows of a table that a step touches.

The state of an optimizer has leaves with a row for each row of the table, such as moments, and leaves that all rows
share, such as step counts. A step takes the touched rows of the table and of such leaves, runs the optimizer on them as
if they were the parameter, and puts the rows of the state back. It must treat each row by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from jax import Array, export
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from centerloss_jax._inputs import (
    DROPPED,
    AxisName,
    at_most,
    axis_names,
    check_axis_name,
    check_mesh,
    check_optimizer,
    check_table,
    compute_dtype,
    is_mapped,
)
from centerloss_jax._kernels import class_sums, sums_in_first_rows
from centerloss_jax._rows import RowUpdates, check_rows, gather_finite, resolve_shards, rows_of_device
from centerloss_jax._sharding import first_row, lay_out_as, num_row_shards, row_axes, set_rows, take_rows


class ByRowsState(NamedTuple):
    """State of `by_rows`.

    Attributes:
      rows_dropped: int32 `[]`, number of rows dropped since the start. Rows are dropped if they or their squared norm
        are not finite, if their index is C or more, or if arithmetic has changed them.
      update_norm: float32 `[]`, Euclidean norm of the last update of all tables together.
      inner_state: state of the wrapped optimizer, with the structure and the shapes of its state for whole tables.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp, optax
      >>> state = clj.by_rows(optax.sgd(0.1, momentum=0.9)).init(jnp.zeros((3, 2)))
      >>> optax.tree.get(state, 'trace').shape
      (3, 2)
    """

    rows_dropped: Array
    update_norm: Array
    inner_state: Any


export.register_namedtuple_serialization(ByRowsState, serialized_name='centerloss_jax.ByRowsState')


def by_rows(
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    r"""Runs `optimizer` on the rows of a table that a step touches, at a cost that does not grow with the table.

    .. math:: (u_J, s_J) = \mathrm{update}(g_J, s_J, t_J), \quad g_j = \sum_{i: k_i = j} v_i, \quad J = \{k_i\}

    for rows :math:`v_i` with indices :math:`k_i`, the table t, the state s and the updates u. All other rows of the
    table and of the state keep their bits: moments of other rows do not decay, as in PyTorch's SparseAdam, and neither
    momentum nor weight decay moves these rows. Step counts are shared, so schedules and bias corrections follow the
    steps of the whole table: a row that Adam first touches late moves by about three learning rates, since the bias
    correction is over by then. Where a step touches each row, it is the step of `optimizer` with a dense gradient.

    The optimizer must treat each row by itself, as sgd, adam, adamw, adagrad, rmsprop and lion do. `init` tries one
    step of it on two rows and raises an error if the step reduces over the rows. An optimizer that reduces over them in
    later steps alone is not noticed, nor one whose learning rate is traced at `init`, nor one that draws noise by the
    place of a row in the step. Accumulate by `concatenate_rows`.

    A row is dropped if it holds a NaN or an Inf or if its squared norm overflows. A table below float32 is moved by the
    optimizer in float32 and rounded once; its state is float32, unless an argument such as `mu_dtype` says otherwise.
    `init` lays the state of a sharded table out as the table, also under `jax.jit`.

    Args:
      optimizer: optax optimizer that needs the gradients, its state and the parameters alone. Schedules, masks and
        `optax.inject_hyperparams` work inside.
      axis_name: the axis of the surrounding `jax.pmap`, `jax.shard_map` or `jax.vmap`. The rows of all devices are
        gathered and divided by the number of devices, as `jax.lax.pmean` does with gradients. Not with class_axis.
      class_axis: the axes of the surrounding `jax.pmap` or `jax.shard_map` that the rows of the tables lie over, as in
        `class_softmax`. Each device moves its own rows, and nothing is gathered. Under `jax.jit` it need not be given:
        rows that lie with their part of the table have a `sharding`.
      mesh: the mesh of Auto axes under `jax.jit`. See `center_update`.

    Returns:
      An `optax.GradientTransformation` for a tree of tables `[C, D]` from RowUpdates `[N, D]` to RowUpdates that move
      the tables: one row for each row of the table where C <= N, else N. Its state is
      `ByRowsState(rows_dropped, update_norm, inner_state)`.

    Raises:
      TypeError: if optimizer is no optax optimizer, or mesh no mesh; from `init`, if the optimizer accumulates, or a
        table is not floating point; from `update`, if it is given anything but RowUpdates, or those of a center loss.
      ValueError: from `init`, if the optimizer reduces over the rows of a table, or a table is not `[C, D]`; from
        `update`, if params are missing, the rows do not fit their table, or class_axis is not theirs.
      NameError: from `update`, if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp, optax
      >>> table, tokens = jnp.ones((4, 2)), jnp.array([2, 0, 2])
      >>> tx = clj.by_rows(optax.sgd(0.25))
      >>> state = tx.init(table)
      >>> gradient = jax.grad(lambda taken: jnp.sum(taken**2) / 2)(table[tokens])
      >>> rows = clj.RowUpdates(tokens, gradient, kind='gradient')
      >>> updates, state = tx.update(rows, state, table)
      >>> optax.apply_updates(table, updates).tolist()
      [[0.75, 0.75], [1.0, 1.0], [0.5, 0.5], [1.0, 1.0]]

    References:
      Kingma and Ba, "Adam", ICLR 2015, whose lazy form for sparse gradients is `torch.optim.SparseAdam`.
    """
    check_optimizer(optimizer, 'optimizer')
    check_mesh(mesh)

    def init(params):
        tables, treedef = jax.tree.flatten(params)
        tables = [_widen(check_table(table, 'a table of by_rows')) for table in tables]
        inner_state = optimizer.init(treedef.unflatten(tables))
        owners = _owners(optimizer, treedef, tables)
        _check_row_by_row(optimizer, treedef, tables, inner_state, owners)
        leaves, state_def = jax.tree.flatten(inner_state)
        leaves = [a if owner is None else lay_out_as(a, tables[owner]) for a, owner in zip(leaves, owners, strict=True)]
        return ByRowsState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), state_def.unflatten(leaves))

    def update(updates, state, params=None):
        check_axis_name(axis_name)
        rows, rows_def = jax.tree.flatten(updates, is_leaf=lambda leaf: isinstance(leaf, RowUpdates))
        check_rows(rows, 'by_rows', 'gradient', "RowUpdates(indices, gradient, kind='gradient')")
        if params is None:
            raise ValueError('by_rows takes the tables too: pass them as update(rows, state, tables)')
        tables = meta.unbox(rows_def.flatten_up_to(params))  # a table may be in a box, as by nn.with_partitioning
        tables = [check_table(table, 'a table of by_rows') for table in tables]
        treedef = jax.tree.structure(params)
        owners = _owners(optimizer, treedef, tables)
        leaves, state_def = jax.tree.flatten(jax.tree.map(jnp.asarray, state.inner_state))  # restored ones are NumPy's
        step = partial(_step, optimizer, treedef, state_def, owners)
        sharding = _common_sharding(rows, class_axis)
        if sharding is not None:
            index, moves, leaves, dropped, squares = _on_class_shards(step, sharding, owners, rows, tables, leaves)
        elif class_axis is not None:
            index, moves, leaves, dropped, squares = step(rows, tables, leaves)
            dropped, squares = jax.lax.psum((dropped, squares), class_axis)
        else:
            index, moves, leaves, dropped, squares = step(rows, tables, leaves, axis_name, mesh)
        moved = [
            RowUpdates(*pair, kind=old.kind, sharding=sharding) for *pair, old in zip(index, moves, rows, strict=True)
        ]
        return treedef.unflatten(moved), ByRowsState(
            rows_dropped=state.rows_dropped + dropped,
            update_norm=jnp.sqrt(squares).astype(jnp.float32),
            inner_state=state_def.unflatten(leaves),
        )

    return optax.GradientTransformation(init, update)


def _step(
    optimizer: optax.GradientTransformation,
    treedef: Any,
    state_def: Any,
    owners: list[int | None],
    rows: list[RowUpdates],
    tables: list[Array],
    leaves: list[Array],
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
):
    """Runs the optimizer on the touched rows.

    Returns for each table the indices of these rows and their moves, the leaves of the new state, how many rows are
    dropped, and the sum of the squared moves.
    """
    sums = [_sum_rows(*pair, axis_name, mesh) for pair in zip(rows, tables, strict=True)]
    index, gradients, dropped = zip(*sums, strict=True)

    def take(leaf, owner):
        return leaf if owner is None else take_rows(leaf, jnp.where(index[owner] < DROPPED, index[owner], 0))

    def put(leaf, owner, new):
        return new if owner is None else set_rows(leaf, index[owner], new)

    updates, state = optimizer.update(
        treedef.unflatten(gradients),
        state_def.unflatten(map(take, leaves, owners)),
        treedef.unflatten(_widen(take(table, owner)) for owner, table in enumerate(tables)),
    )
    new_leaves = [*map(put, leaves, owners, state_def.flatten_up_to(state))]
    moves = [jnp.where((k < DROPPED)[:, None], u, 0) for k, u in zip(index, jax.tree.leaves(updates), strict=True)]
    return [*index], moves, new_leaves, sum(dropped), sum(jnp.sum(jnp.square(move)) for move in moves)


def _on_class_shards(
    step: Callable,
    sharding: NamedSharding,
    owners: list[int | None],
    rows: list[RowUpdates],
    tables: list[Array],
    leaves: list[Array],
):
    """Returns what `step` returns, where each device has the rows of its own part of the tables."""
    class_axis = row_axes(sharding)

    def step_of_device(arrays, tables, leaves):
        rows = [rows_of_device(*pair, sharding) for pair in zip(arrays, tables, strict=True)]
        index, moves, leaves, *totals = step(rows, tables, leaves)
        first = [first_row(class_axis, table.shape[0]) for table in tables]
        index = [jnp.where(k < DROPPED, k + n, DROPPED) for k, n in zip(index, first, strict=True)]
        return index, moves, leaves, *jax.lax.psum(totals, class_axis)

    by_class = sharding.spec
    of_leaves = [P() if owner is None else by_class for owner in owners]
    specs = {'in_specs': (by_class, by_class, of_leaves), 'out_specs': (by_class, by_class, of_leaves, P(), P())}
    arrays = [resolve_shards(*pair, num_row_shards(sharding)) for pair in zip(rows, tables, strict=True)]
    return jax.shard_map(step_of_device, mesh=sharding.mesh, **specs)(arrays, tables, leaves)


def _common_sharding(rows: list[RowUpdates], class_axis: AxisName | None) -> NamedSharding | None:
    """Returns how the rows lie with their class shards under `jax.jit`, and checks that class_axis agrees."""
    shardings = {leaf.sharding for leaf in rows}
    if len(shardings) > 1:
        raise ValueError(
            'the tables of one by_rows must all lie over the same mesh axes: give each a by_rows of its own, by '
            'optax.partition'
        )
    (sharding,) = shardings
    names = axis_names(class_axis, 'class_axis')
    if sharding is None and not all(map(is_mapped, names)):
        raise ValueError(
            f'class_axis={class_axis!r} is no axis of a jax.shard_map or jax.pmap around this call, and the rows do '
            'not lie with their class shard: pass the rows of a softmax that was given class_axis, or leave it out'
        )
    if sharding is not None and names not in ((), row_axes(sharding)):
        raise ValueError(f'class_axis is {class_axis!r}, but the rows lie over {row_axes(sharding)}')
    return sharding


def _widen(table: Array) -> Array:
    return table.astype(compute_dtype(table.dtype))


def _sum_rows(rows: RowUpdates, table: Array, axis_name: AxisName | None, mesh: Mesh | None):
    """Returns each touched row of the table once, filled up by DROPPED, their gradients, and how many are dropped."""
    index, values, scale, _, dropped = gather_finite(rows, table, axis_name, mesh)
    if axis_name is not None:
        scale = scale / jax.lax.axis_size(axis_name)
    if index.size == 0:
        unique, sums = index, values
    elif at_most(table.shape[0], index.size):
        unique, sums = class_sums(index, values, scale, table.shape[0])
    else:
        unique, sums = sums_in_first_rows(index, values, scale, table.shape[0])
    return unique, sums.astype(compute_dtype(table.dtype)), dropped


def _owners(optimizer: optax.GradientTransformation, treedef: Any, tables: list[Array]) -> list[int | None]:
    """Returns for each leaf of the state the number of the table whose rows it has, or None if all rows share it.

    A leaf has the rows of a table if it grows with the table. A comparison of shapes would be wrong where C = D.
    """
    shapes = _state_shapes(optimizer, treedef, tables)
    owners: list[int | None] = [None] * len(shapes)
    for number in range(len(tables)):
        grown = _state_shapes(optimizer, treedef, tables, number)
        owners = [number if new != old else owner for owner, old, new in zip(owners, shapes, grown, strict=True)]
    return owners


def _state_shapes(optimizer: optax.GradientTransformation, treedef: Any, tables: list[Array], grown: int | None = None):
    """Returns the shapes of the state's leaves for tables of two rows, of which one may have grown by a row."""
    small = [
        jax.ShapeDtypeStruct((2 + (number == grown), table.shape[1]), compute_dtype(table.dtype))
        for number, table in enumerate(tables)
    ]
    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, treedef.unflatten(small)))]


def _check_row_by_row(
    optimizer: optax.GradientTransformation,
    treedef: Any,
    tables: list[Array],
    state: Any,
    owners: list[int | None],
) -> None:
    """Raises an error if the optimizer accumulates, or if the step of a row depends on other rows of the step."""
    accumulator = optax.MultiStepsState, optax.ApplyEvery
    if any(
        isinstance(node, accumulator) for node in jax.tree.leaves(state, lambda node: isinstance(node, accumulator))
    ):
        raise TypeError(
            'the optimizer of by_rows accumulates over steps, but the step that moves the table moves its own rows '
            'alone: leave out optax.MultiSteps and optax.apply_every, and join the rows of several passes by '
            'concatenate_rows'
        )
    small_shapes = _state_shapes(optimizer, treedef, tables)
    shapes = [
        shape if owner is None else (tables[owner].shape[0], *shape[1:])
        for owner, shape in zip(owners, small_shapes, strict=True)
    ]

    @jax.jit
    def first_rows(two_rows: Any) -> list[Array]:
        """Returns the first row's update and state, and the state that all rows share."""
        updates, new_state = optimizer.update(two_rows, optimizer.init(two_rows), two_rows)
        leaves = zip(jax.tree.leaves(new_state), owners, strict=True)
        return [a[0] for a in jax.tree.leaves(updates)] + [a if owner is None else a[0] for a, owner in leaves]

    @jax.jit
    def same(first: list[Array], other: list[Array]) -> list[Array]:
        return [jnp.all((a == b) | (a != a) & (b != b)) for a, b in zip(first, other, strict=True)]

    by_row = shapes == [leaf.shape for leaf in jax.tree.leaves(state)]
    if by_row:
        # Ones, and a second row that must not matter. One program makes all three, so that their bits can be compared.
        trials = [
            treedef.unflatten(np.full((2, table.shape[1]), [[1], [second]], table.dtype) for table in tables)
            for second in (1, np.nan, 1000)
        ]
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):
            first, *others = map(first_rows, trials)
            found = [known for other in others for known in same(first, other)]
        # Under a traced learning rate nothing is known.
        by_row = all(isinstance(known, Tracer) or known for known in found)
    if not by_row:
        raise ValueError(
            'the optimizer of by_rows gets the rows of a step alone, so it must treat each row by itself, but this one '
            'reduces over the rows of a table, as lamb, adafactor, muon, clip_by_global_norm and apply_if_finite do: '
            'take another, such as adam, and clip the gradient before it becomes rows'
        )
