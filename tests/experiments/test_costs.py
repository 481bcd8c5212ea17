"""The cost model against what the compiler reports: what is kept, and what travels, of the step on several meshes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj
from experiments import costs
from experiments.launch import cli
from experiments.launch.errors import FlagError
from experiments.launch.mesh import over_mesh
from tests.support.cases import some_by_default
from tests.support.programs import AS_USERS, collective_sizes, memory, shapes

pytestmark = pytest.mark.usefixtures('all_optimizations')

B, D, C = 4096, 64, 1_000_000


def compiled_step(**sizes: int) -> Any:
    mesh: Any = over_mesh(jax.devices()[: int(np.prod([*sizes.values()]))], sizes).mesh
    tx = clj.center_update(0.5, mesh=mesh)

    def step(table, state, x, labels):
        (_, rows), gradient = jax.value_and_grad(lambda x: clj.center_loss_and_rows(x, table, labels), has_aux=True)(x)
        updates, state = tx.update(rows, state, table)
        return optax.apply_updates(table, updates), state, gradient

    def shape(dimensions, dtype, *spec):
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=NamedSharding(mesh, P(*spec)))

    state = jax.tree.map(lambda a: shape(a.shape, a.dtype), tx.init(jnp.zeros((1, D))))
    table = shape((C, D), jnp.float32, 'classes' if 'classes' in sizes else None)
    axes = tuple(sizes)
    return (
        jax.jit(step, donate_argnums=0)
        .lower(table, state, shape((B, D), jnp.float32, axes), shape((B,), jnp.int32, axes))
        .compile(AS_USERS)
    )


MESHES = {str(sizes): sizes for sizes in ({'data': 1}, {'data': 8}, {'classes': 8}, {'data': 2, 'classes': 4})}


@pytest.mark.parametrize('sizes', some_by_default(MESHES, str({'data': 2, 'classes': 4})))
def test_the_model_is_what_the_compiler_reports(sizes):
    model = costs.step_costs(C, D, B, **sizes)
    compiled = compiled_step(**sizes)
    memory = compiled.memory_analysis()
    assert model.table <= memory.alias_size_in_bytes < 1.01 * model.table
    assert model.temporaries / 8 < memory.temp_size_in_bytes < model.temporaries

    # The collectives that carry rows; the others carry a number an example.
    data, classes = sizes.get('data', 1), sizes.get('classes', 1)
    looked_up, gathered = B // data * D, B * D
    expected = ([looked_up] if classes > 1 else []) + ([gathered] if data * classes > 1 else [])
    assert [size for size in collective_sizes(compiled) if size > B] == expected


def test_by_hand():
    one = costs.step_costs(10, 2, 4)
    assert one == (80, 320, 4 * 64 + 4 * 2 * 4, 5 * 4 * 2 * 4, 0)
    # 3 of 10 rows on each of 4 devices; the group of 4 looks up 2 of 4 examples, and has them all in the end.
    mesh = costs.step_costs(10, 2, 4, data=2, classes=4)
    assert mesh == (24, 96, 4 * 64 + 64 + 4 * 8, 8 * (12 / 8 + 8 / 4 + 8), 8 * (2 * 3 / 4 * 2 + 7 / 8 * 4))
    assert costs.step_costs(10, 2, 4, itemsize=2).table == 40
    # The sums of four classes beside the indices of five examples.
    assert costs.step_costs(4, 2, 5).temporaries == 5 * 64 + 4 * 8


def test_the_classifier_by_hand():
    # 4 of 10 rows on each of 3 devices, and 2 of 5 sampled ones; each has the features of 6 examples.
    assert costs.classifier_costs(10, 2, 6, 5, devices=3) == (32, 32, 64, 32, 8 * (10 + 12) + 64 * 2 + 16 * 6 * 2)
    assert costs.classifier_costs(10, 2, 6, 5).temporaries == 8 * 25 + 64 * 5 + 16 * 6 * 5


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'devices'), [('adam', 1), ('momentum', 8)])
def test_the_model_of_the_classifier_is_what_the_compiler_reports(name, devices):
    # A device computes with the rows of its own classes, so its program is that of a table of this size.
    num_classes, num_sampled, batch_size = 160_000, 16_000, 128
    optimizer = {'momentum': optax.sgd(0.1, momentum=0.9), 'adam': optax.adam(1e-3)}[name]
    tx: Any = clj.by_rows(optimizer)

    def step(table, state, key, x, labels):
        classes = clj.sample_classes(key, labels, len(table), num_sampled // devices)
        loss_fn = partial(clj.margin_softmax_and_rows, table=table, labels=labels, classes=classes)
        (_, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
        updates, state = tx.update(rows, state, table)
        return optax.apply_updates(table, updates), state, gradient

    key = jax.eval_shape(jax.random.key, 0)
    table, x, labels = shapes(
        ((num_classes // devices, D), jnp.float32), ((batch_size, D), jnp.float32), ((batch_size,), jnp.int32)
    )
    step = jax.jit(step, donate_argnums=(0, 1))
    reported = memory(step, table, jax.eval_shape(tx.init, table), key, x, labels)
    model = costs.classifier_costs(num_classes, D, batch_size, num_sampled, devices=devices)
    kept = model.weights + getattr(model, name)
    assert kept <= reported.alias_size_in_bytes < 1.01 * kept
    assert model.sample < reported.temp_size_in_bytes < model.temporaries < 2 * reported.temp_size_in_bytes


def test_a_share_of_no_class_is_named():
    with pytest.raises(FlagError, match=r'--sampled-share must be above 0 and at most 1, got 0\.0'):
        costs.Config(sampled_share=0.0)


def test_no_mesh_is_one_line_that_names_the_flag_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(costs.Config, costs.main, 'experiments.costs', ['--meshes'])
    assert end.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert '--meshes' in error


def test_the_command_prints_a_row_for_each_mesh(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(costs.Config, costs.main, 'experiments.costs', ['--meshes', 'classes=4', 'data=2,classes=4'])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if '=' in line] == ['classes=4', 'data=2,classes=4']
    rows = [line.split()[1] for line in printed.split('devices')[1].splitlines() if line.startswith('│')]
    assert rows == ['4', '8']
