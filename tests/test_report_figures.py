import io
import re

import numpy as np
import pytest
from PIL import Image

from moejax.report.axes import Scale, log_ticks, reduced, scale_over, short, smooth, thinned, tick_names
from moejax.report.chart import Curve, Mark, Span, chart
from moejax.report.heat import LEVELS, LOAD, MISSING, NOTHING, heat_map, load_levels, png, signed_levels, signed_palette


def test_thinned_keeps_the_extremes_and_the_ends():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 54_321]] = 50.0, -60.0
    kept = thinned(values, 200)
    assert len(kept) <= 402 and (np.diff(kept) > 0).all()
    assert {0, 777, 54_321, 99_999} <= set(kept)
    np.testing.assert_array_equal(thinned(values[:400], 200), np.arange(400))


def test_thinned_shows_a_gap():
    values = np.ones(1000)
    values[300:600] = np.nan
    assert np.isnan(values[thinned(values, 50)]).any()


def test_reduced_keeps_the_extremes_of_each_part():
    values = np.arange(1000.0).reshape(500, 2)
    most = reduced(values, 10, np.fmax)
    np.testing.assert_array_equal(most, values[49::50])
    np.testing.assert_array_equal(reduced(values, 500, np.fmax), values)


@pytest.mark.parametrize("low,high", [(0, 1), (-3, 7.2), (0.00031, 0.00052), (1e9, 7e9)])
def test_ticks_are_round_and_on_the_axis(low, high):
    ticks = np.array(Scale(low, high, 100).ticks(6))
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 7 and ticks[0] >= low - 1e-9 * abs(low) and ticks[-1] <= high * (1 + 1e-9)
    np.testing.assert_allclose(np.diff(ticks), step, rtol=1e-6)
    assert f"{step:e}"[0] in "125"
    assert len(set(tick_names(ticks))) == len(ticks)


def test_log_ticks_are_powers_of_ten_where_there_are_many():
    assert log_ticks(0.5, 20, 6) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    ticks = log_ticks(1e-8, 1e8, 5)
    assert len(ticks) <= 5 and np.allclose(np.log10(ticks), np.round(np.log10(ticks)))


def test_a_spike_does_not_flatten_the_rest():
    values = np.append(np.linspace(2, 3, 200), 1e6)
    scale, cut = scale_over(values, 100)
    assert cut and scale.high < 4
    scale, cut = scale_over(values[:-1], 100)
    assert not cut and scale.low < 2 and scale.high > 3


def test_a_constant_is_no_matter_of_rounding():
    for values in ([5.0, 5.0], [0.001, 0.001 + 1e-18], [0.0, 0.0]):
        scale, _ = scale_over(np.array(values), 100)
        ticks = tick_names(scale.ticks(5))
        assert scale.low < values[0] < scale.high and len(set(ticks)) == len(ticks) >= 2


def test_numbers_are_short():
    names = [short(value) for value in (0, 0.04567891, 1234.5, 12345, 4.56e6, 671e9, 14.8e12, float("nan"))]
    assert names == ["0", "0.04568", "1234", "12.3k", "4.56M", "671B", "14.8T", "-"]


def test_smooth_is_the_mean_of_the_steps_around():
    values = np.arange(40.0) ** 2
    np.testing.assert_allclose(smooth(values)[[4, -1]], [np.mean(values[2:7]), np.mean(values[-3:])])


def curve(**fields):
    return Curve("training", np.arange(1, 51), np.linspace(5, 2, 50), **fields)


def test_chart_has_its_curve_where_the_numbers_are():
    found = chart("Loss", "nats", [curve()], lines=[(3.0, "unigram")], marks=[Mark(20, "fault", "step 20")])
    path = re.search(r'class="line" d="([^"]+)"', found)
    points = [tuple(map(float, point.split())) for point in re.split("[ML]", path[1])[1:]]
    assert len(points) == 50
    x, y = np.array(points).T
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.11)  # coordinates have one digit
    np.testing.assert_allclose(np.diff(y), np.diff(y)[0], atol=0.11)  # and the line falls on the page as it should
    assert y[-1] > y[0] and "step 20" in found and "unigram <b>3</b>" in found and "training <b>2</b>" in found


def test_curve_is_interrupted_where_a_number_is_missing():
    values = np.linspace(5, 2, 50)
    values[[10, 12]] = np.nan
    path = re.search(r'class="line" d="([^"]+)"', chart("Loss", "", [Curve("a", np.arange(50), values)]))
    assert path[1].count("M") == 3 and path[1].count("h.1") == 1  # the one between two gaps is a dot


def test_a_chart_without_a_number_is_none():
    assert chart("Loss", "", [Curve("a", np.arange(3), np.full(3, np.nan))]) == ""


def test_a_chart_escapes_every_text():
    bad = "<script>\"'&"
    found = chart(bad, bad, [Curve(bad, np.arange(3), np.arange(3.0), value=bad)], x_name=bad, note=bad)
    found += chart(bad, "", [curve()], lines=[(3, bad)], spans=[Span(0, 50, bad)], marks=[Mark(3, "fault", bad)])
    found += heat_map(bad, bad, np.zeros((2, 3), np.uint8), LOAD, rows=[bad, bad], columns=np.arange(3), row_name=bad,
                      column_name=bad, words=[bad, bad], note=bad)  # fmt: skip
    assert "<script" not in found and "&lt;script&gt;&quot;&#x27;&amp;" in found


def test_png_is_what_went_in():
    levels = np.random.default_rng(0).integers(0, 256, (37, 53)).astype(np.uint8)
    with Image.open(io.BytesIO(png(levels, LOAD.colours()))) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGBA")), LOAD.colours()[levels])


def test_colours_of_loads():
    """The mean is the page itself; twice and half of it are equally strong; an idle expert stands out."""
    levels = load_levels(np.array([[1.0, 2.0, 0.5, 16.0, 0.01, 0.0, np.nan]]))[0].astype(int)
    assert levels[0] == LEVELS and levels[1] - LEVELS == LEVELS - levels[2] > 0
    assert levels[3:].tolist() == [2 * LEVELS, 0, NOTHING, MISSING]
    opacity = LOAD.colours()[levels, 3]
    assert opacity[0] == 0 and opacity[1] == opacity[2] and opacity[3] == opacity[5] == 255


def test_colours_of_biases_are_even_about_0():
    levels = signed_levels(np.array([-2.0, -1.0, 0.0, 1.0]), 2.0).astype(int)
    assert levels.tolist() == [0, 2 * LEVELS - levels[3], LEVELS, levels[3]]
    assert signed_palette(2.0).colours()[LEVELS, 3] == 0
