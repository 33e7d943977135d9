"""Colours and markers that do not rely on colour vision: Okabe and Ito's palette, and a shape per series."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def series_style(index: int) -> dict[str, str]:
    """Returns a colour and a marker; with 7 colours and 10 shapes the first 70 series differ.

    >>> series_style(1)
    {'color': '#D55E00', 'marker': 's'}
    """
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
