"""Images in a grid, with a caption each."""

import numpy as np
import pytest

from experiments.plots.contact_sheet import draw_contact_sheet


@pytest.mark.parametrize('count', [1, 7, 100])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_contact_sheet_shows_images_with_their_captions_and_frames_those_that_are_doubtful(tmp_path, count, channels):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 6, channels), dtype=np.uint8)
    captions = [f'image {number}' for number in range(count)]
    doubtful = np.arange(count) % 2 == 1
    figure = draw_contact_sheet(tmp_path / 'sheet.png', images, captions, doubtful, title='a $sheet')
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == min(count, 60)
    for axes in shown:
        number = int(axes.get_xlabel().split()[1])
        array = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(array.reshape(images[number].shape), images[number])
        assert axes.spines['left'].get_visible() == doubtful[number]
    assert ('60 of 100 images' in figure.get_suptitle()) == (count == 100)
