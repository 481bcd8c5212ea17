"""A run whose start fails can be started again."""

from pathlib import Path

import pytest

from experiments.launch.errors import RunError
from experiments.launch.run_folder import CONFIG, DATA, Run, read_json

SETTINGS = {'model': 'small', 'feature_dim': 2, 'dataset': 'digits'}


def start(out: Path, identity: dict[str, str], *, overwrite: bool = False) -> None:
    run = Run(out, overwrite=overwrite, resume=not overwrite)
    if run.resumed:
        run.check_data('digits', identity)
    run.start(SETTINGS, identity)


def test_a_setting_that_an_earlier_version_lacks_is_compared_and_is_no_setting_of_other_runs(tmp_path):
    start(tmp_path, {})
    run = Run(tmp_path, overwrite=False, resume=True)
    assert run.config() == SETTINGS
    run.check({**SETTINGS, 'images_per_class': 0})
    with pytest.raises(RunError, match='images-per-class is 8'):
        run.check({'images_per_class': 8})
    run.start({**SETTINGS, 'images_per_class': 8, 'seed': 0}, {})
    assert [*run.config()] == [*SETTINGS, 'images_per_class', 'seed']


@pytest.mark.parametrize('before', [False, True], ids=['new', 'overwritten'])
@pytest.mark.parametrize('name', [CONFIG, DATA])
def test_a_start_that_fails_at_a_file_can_be_repeated(tmp_path, name, before):
    out = tmp_path / 'run'
    if before:
        start(out, {'split train': '3 examples'})
    identity = {'split train': '4 examples'}
    blocker = out / f'.{name}.draft' / 'folder'
    blocker.mkdir(parents=True)
    with pytest.raises(OSError, match='directory'):
        start(out, identity, overwrite=before)
    blocker.rmdir()
    blocker.parent.rmdir()
    start(out, identity)
    assert read_json(out / DATA) == identity
