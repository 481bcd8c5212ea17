"""The page that an experiment leaves behind, read as a browser reads it."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from experiments.metrics.held_out import Interval
from experiments.plots.measures import MEASURES, format_value
from experiments.plots.report import write_report

ARM = {
    'test_accuracy': 0.95273,
    'nearest_center_accuracy': 0.9,
    'intra_inter_ratio': 0.065123,
    'collapsed': False,
    'seconds': 12.34,
}


def row(epoch: int, arm: str, **values: float | None) -> dict:
    return {'epoch': epoch, 'arm': arm, **values}


@pytest.fixture
def write(tmp_path):
    """Writes a full page, or one in which some parts are others, and returns its path."""

    def write(**parts) -> Path:
        still, moving = tmp_path / 'features.png', tmp_path / 'features.gif'
        pictures = [Image.new('RGB', (1200, 1300), color) for color in ('white', 'red', 'blue')]
        pictures[0].save(still)
        pictures[1].save(moving, save_all=True, append_images=pictures[2:])
        for name in ('config.json', 'metrics.csv', 'summary.json'):
            (tmp_path / name).write_text('')
        metrics = [
            row(e, arm, softmax_loss=2 / e, center_loss=e * 1.5, rows_dropped=0, epoch_seconds=0.5)
            for e in range(1, 31)
            for arm in ('softmax', 'center')
        ]
        page = {
            'title': 'Two dimensions',
            'lead': 'One network, trained twice.',
            'command': 'python -m experiments.toy2d ' + '--option value ' * 10,
            'summary': {'softmax': ARM, 'center': ARM},
            'metrics': metrics,
            'pictures': {'The features.': still, 'The features through the epochs.': moving},
            'config': {'data_dir': '/a' * 100, 'devices': ['cpu:0', 'cpu:1'], 'versions': {'jax': '0.10.2'}},
        }
        write_report(tmp_path / 'report.html', **(page | parts))
        return tmp_path / 'report.html'

    return write


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, its text, and the cells of its tables by row."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ''
        self._inside = ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.elements.append((tag, dict(attrs)))
        if tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        self._inside = ''

    def handle_data(self, data):
        if self._inside in ('td', 'th'):
            self.rows[-1][-1] += data
        if self._inside != 'style':
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def inspect(page: Path, width: int) -> tuple[dict, list[str]]:
    """What a browser makes of a page in a window of some width, and the errors on its console."""
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        pytest.skip('no Chromium to load the page in')
    # A frame, since Chromium's own windows are never as narrow as a phone.
    frame = page.with_name('frame.html')
    frame.write_text(
        f"""<link rel="icon" href="data:,"><body><iframe src="{page.name}" width="{width}" height="800"
        style="border: 0"></iframe><script>
        onload = () => {{
          const inner = document.querySelector('iframe').contentWindow, page = inner.document;
          document.body.textContent = 'FOUND' + JSON.stringify({{
            images: [...page.images].map(image => image.naturalWidth),
            charts: [...page.querySelectorAll('.chart > img')].map(chart => chart.getBoundingClientRect().width),
            width: inner.innerWidth,
            needed: page.documentElement.scrollWidth,
            hidden: [...page.querySelectorAll('pre')].map(block => block.scrollWidth - block.clientWidth),
          }}) + 'END';
        }}
        </script>"""
    )
    switches = [
        '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-quic',
        '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run',
        '--allow-file-access-from-files', '--enable-logging=stderr', '--v=0', '--window-size=1400,900',
        f'--user-data-dir={page.parent / "chromium"}', '--dump-dom',
    ]  # fmt: skip
    run = subprocess.run([chromium, *switches, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    found = re.search('FOUND(.*)END', run.stdout)
    assert found, run.stderr
    return json.loads(html.unescape(found[1])), re.findall(r'.*CONSOLE.*', run.stderr)


@pytest.mark.parametrize('width', [360, 1280])
def test_the_page_loads_without_faults_and_fits_a_phone_and_a_screen(write, width):
    many = {f'arm {i} with a name': ARM for i in range(9)}
    found, errors = inspect(write(summary=many), width)
    assert not errors
    assert found['images'] == [1200, 1200, 680, 680]
    assert found['hidden'] == [0]
    assert len(found['charts']) == 2
    assert 280 <= min(found['charts']) <= max(found['charts']) <= width
    assert found['needed'] <= found['width'] == width


def test_faults_of_a_page_would_be_seen(tmp_path):
    page = tmp_path / 'bad.html'
    page.write_text('<img src="missing.png"><div style="width: 500px">wide</div><script>oops()</script>')
    found, errors = inspect(page, 360)
    assert found['images'] == [0]
    assert found['needed'] > found['width']
    assert 'oops is not defined' in '\n'.join(errors)


def test_the_page_holds_all_it_shows(write):
    page = Page(path := write())
    assert {tag for tag, _ in page.elements}.isdisjoint({'script', 'iframe', 'object', 'embed'})
    sources = [a[name] for _, a in page.elements for name in a if name in ('src', 'srcset', 'data')]
    assert len(sources) == 4
    assert all(value and value.startswith('data:image/') for value in sources)
    assert [a['href'] for a in page.all('link')] == ['data:,']
    assert not re.search(r'url\(|@import', path.read_text())


def test_the_page_can_be_read_aloud(write):
    page = Page(write())
    assert page.all('html') == [{'lang': 'en'}]
    assert 'Two dimensions' in page.text
    assert [a['alt'] for a in page.all('img')] == [
        'The features.',
        'The features through the epochs.',
        'softmax loss over the epochs; last values: softmax: 0.06667, center: 0.06667',
        'center loss over the epochs; last values: softmax: 45, center: 45',
    ]
    assert [tag for tag, _ in page.elements if re.fullmatch('h[1-6]', tag)][:2] == ['h1', 'h2']


def test_files_beside_the_page_are_linked(write, tmp_path):
    (tmp_path / 'centers & more 100%.csv').write_text('')
    links = [unquote(a['href'] or '') for a in Page(write()).all('a')]
    assert {'config.json', 'metrics.csv', 'summary.json', 'features.png', 'features.gif'} < set(links)
    assert 'centers & more 100%.csv' in links
    assert all((tmp_path / link).is_file() for link in links)


def test_what_users_type_is_shown_and_never_run(write):
    evil = '"><script>alert(1)</script>\'&amp;<img src=x onerror=alert(2)>'
    page = Page(
        write(
            title=evil,
            lead=evil,
            command=evil,
            config={evil: evil, 'nested': {evil: [evil]}},
            summary={evil: ARM, 'note': evil},
            metrics=[row(1, evil, loss=1.0), row(2, evil, loss=2.0)],
        )
    )
    assert not page.all('script')
    *_, chart = page.all('img')
    assert chart['alt'] == f'loss over the epochs; last values: {evil}: 2'
    assert len(page.all('img')) == 3
    assert page.text.count(evil) == 10


def test_numbers_stand_in_the_table_by_measure_and_arm(write):
    collapsed = ARM | {'intra_inter_ratio': None, 'collapsed': True, 'test_accuracy': 0.1}
    page = Page(write(summary={'softmax': ARM, 'center': collapsed, 'examples': 1797}))
    assert page.rows[:6] == [
        ['', 'softmax', 'center'],
        ['test accuracy', '95.27 %', '10 %'],
        ['nearest-center accuracy', '90 %', '90 %'],
        ['intra/inter ratio', '0.06512', '\N{EN DASH}'],
        ['collapsed', 'no', 'yes'],
        ['seconds', '12.34', '12.34'],
    ]
    assert 'examples: 1797' in page.text


def test_a_difference_of_shares_is_in_points_and_a_phone_names_the_arm_of_each_number(write):
    shares = {'test_accuracy': Interval(0.951, 0.941, 0.961), 'eer': Interval(0.3, 0.2, 0.4)}
    added = {'test_accuracy': Interval(-0.01, -0.03, 0.01), 'eer': Interval(0.1, 0.05, 0.15)}
    page = Page(write(summary={'softmax': shares, 'center - softmax': added}, differences=('center - softmax',)))
    assert page.rows[1:3] == [
        ['test accuracy', '95.10 ± 1.00 %', '-1.00 ± 2.00 points'],
        ['equal error rate', '0.3 ± 0.1', '0.1 ± 0.05'],
    ]
    assert [cell.get('data-column') for cell in page.all('td')[1:5]] == ['softmax', 'center - softmax'] * 2


@pytest.mark.parametrize(
    ('mean', 'half', 'text'),
    [
        (0.05908, 0.0075, '0.0591 ± 0.0075'),
        (2e-17, 0.0015, '0 ± 0.0015'),
        (-0.00663, 0.001, '-0.0066 ± 0.001'),
        (3, 0, '3 ± 0'),
    ],
)
def test_a_mean_has_the_digits_of_its_interval(mean, half, text):
    assert format_value(Interval(mean, mean - half, mean + half)) == text


def test_arms_that_outnumber_the_measures_are_rows(write):
    arms = {f'arm {number}': {'eer': number / 8, 'rank_1': 0.5} for number in range(3)}
    page = Page(write(summary=arms))
    assert page.rows[:4] == [
        ['', 'equal error rate', 'rank-1'],
        ['arm 0', '0', '0.5'],
        ['arm 1', '0.125', '0.5'],
        ['arm 2', '0.25', '0.5'],
    ]
    assert [cell.get('data-column') for cell in page.all('td')[1:3]] == ['equal error rate', 'rank-1']


def test_a_collapsed_arm_is_named_at_the_top(write):
    assert 'Collapsed:' not in Page(write()).text
    page = Page(write(summary={'softmax': ARM, 'center': ARM | {'collapsed': True}}))
    assert 'Collapsed: center.' in page.text
    assert page.text.index('Collapsed: center.') < page.text.index('Results')


def test_measures_are_explained_where_they_are_shown_and_only_there(write):
    text = Page(write()).text
    assert 'It may rise while training goes well' in text
    assert 'Smaller means tighter classes' in text
    assert MEASURES['center_step_norm'][1] not in text


def test_settings_devices_versions_and_the_command_are_there(write):
    page = Page(write())
    assert ['devices', 'cpu:0, cpu:1'] in page.rows
    assert ['jax', '0.10.2'] in page.rows
    assert '--option value --option value' in page.text


def test_parts_that_an_experiment_does_not_have_leave_no_empty_sections(write):
    page = Page(write(metrics=[], pictures={}, command='', lead='', config={}))
    assert 'Results' in page.text
    for heading in ('Pictures', 'Over the epochs', 'Repeat this run', 'Settings'):
        assert heading not in page.text
