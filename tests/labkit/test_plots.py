"""labkit.plots and labkit.predict: colours stay apart for everyone, labels do not overlap, intervals are honest."""

import itertools
from dataclasses import asdict

import matplotlib
import numpy as np
import pytest

from labkit.plots import COLOURS, GROUND, band, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Machado, Oliveira and Fernandes, 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# table 1, severity 1.0; applied to linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    srgb = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart(sight: str) -> None:
    for one, two in itertools.combinations(asdict(COLOURS).values(), 2):
        apart = np.linalg.norm(lab(SIGHT[sight] @ linear(one)) - lab(SIGHT[sight] @ linear(two)))
        assert apart > 15, (one, two, apart)  # CIE76; about 2.3 is just noticeable side by side


def test_every_colour_has_contrast_with_the_ground() -> None:
    for colour in asdict(COLOURS).values():
        dark, light = sorted(float(TO_XYZ[1] @ linear(c)) for c in (colour, GROUND))
        assert (light + 0.05) / (dark + 0.05) >= 3, colour  # WCAG 2.2, 1.4.11: graphical objects


@pytest.fixture
def ax() -> object:
    use_house_style()
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.mark.parametrize("ends", [[0.5, 0.5, 0.5], [1.0, 1.0, 0.99, 0.0], [0.0, 0.01, 1.0], [0.3]])
def test_labels_stand_at_their_lines_and_never_overlap(ax: plt.Axes, ends: list[float]) -> None:
    ax.set_ylim(0, 1)
    for position, end in enumerate(ends):
        ax.plot([0, 1, 2], [0.5, 0.2, end], label=f"line {position}")
    label_lines(ax)
    assert [text.get_text() for text in ax.texts] == [f"line {i}" for i in range(len(ends))]
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in ax.get_lines()]
    heights = [text.xy[1] for text in ax.texts]
    assert all(abs(a - b) > 0.0749 for a, b in itertools.combinations(heights, 2))
    assert np.argsort(heights, stable=True).tolist() == np.argsort(ends, stable=True).tolist()
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in heights)


def test_label_lines_wants_labels_and_points(ax: plt.Axes) -> None:
    ax.plot([0, 1], [0, 1])
    with pytest.raises(ValueError, match="no line has a label"):
        label_lines(ax)
    ax.plot([0, 1], [np.nan, np.nan], label="empty")
    with pytest.raises(ValueError, match="'empty' has no finite point"):
        label_lines(ax)


def test_intervals_are_drawn_from_low_to_high(ax: plt.Axes) -> None:
    intervals(ax, [1, 2], [0.5, 0.6], [0.4, 0.6], [0.8, 0.7], COLOURS.after)
    bars = ax.containers[0].lines[2][0].get_segments()
    assert np.allclose(bars[0], [[1, 0.4], [1, 0.8]])
    assert np.allclose(bars[1], [[2, 0.6], [2, 0.7]])
    with pytest.raises(ValueError, match="bounds, not widths"):
        intervals(ax, [1], [0.5], [0.1], [0.1], COLOURS.after)


def test_band_and_direct_label_draw(ax: plt.Axes) -> None:
    band(ax, [0, 1], [0, 0], [1, 1], COLOURS.truth)
    direct_label(ax, 0.5, 0.5, "here", COLOURS.truth)
    assert len(ax.collections) == 1
    assert ax.texts[0].get_text() == "here"
    ax.figure.canvas.draw()


def test_predictions_stand_beside_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr("labkit.predict.display", shown.append)
    compare([("coverage", 0.95, 0.8)], format=".1%")
    compare([("parameters", 1000, 12345)], format=",d")
    html = shown[0].to_html()  # type: ignore[attr-defined]
    for text in ("coverage", "95.0%", "80.0%", "-15.0 points"):
        assert text in html
    assert "+11,345" in shown[1].to_html()  # type: ignore[attr-defined]
