"""One layer of a Llama-like decoder, drawn with the shapes of a configuration."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labutils.lab.layers.architecture import Architecture
from labutils.lab.plots.style import PALETTE

STREAM, ATTENTION, MLP = PALETTE[:3]
ARROWS = (
    ("embedding", "add 1", "add 2", "last norm", "head"),
    ("norm 1", "q", "attention", "o", "add 1"),
    ("norm 1", "k", "attention"),
    ("norm 1", "v", "attention"),
    ("norm 2", "gate", "times", "down", "add 2"),
    ("norm 2", "up", "times"),
)


def draw_block(config, *, ax: Axes | None = None) -> Figure:
    """Draws the residual stream, and above it the two branches that each layer adds to it.

    Args:
        config: of a Llama-like model; its numbers stand in the boxes as out_features × in_features.
        ax: Where to draw; a new figure by default.
    """
    ax = ax or Figure(figsize=(11, 4.8), layout="constrained").subplots()
    size, hidden, inner = Architecture.of(config), config.hidden_size, config.intermediate_size
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    head = "head:\nthe same table" if config.tie_word_embeddings else f"head\n{config.vocab_size} × {hidden}"
    boxes = {
        "embedding": (0.9, 0, f"embedding\n{config.vocab_size} × {hidden}", STREAM),
        "add 1": (6.1, 0, "+", STREAM),
        "add 2": (10.3, 0, "+", STREAM),
        "last norm": (11.5, 0, f"RMSNorm\ngain {hidden}", STREAM),
        "head": (12.9, 0, head, STREAM),
        "norm 1": (2.3, 1.2, f"RMSNorm\ngain {hidden}", ATTENTION),
        "q": (3.6, 2.6, f"q {queries} × {hidden}\nthen RoPE", ATTENTION),
        "k": (3.6, 1.9, f"k {keys} × {hidden}\nthen RoPE", ATTENTION),
        "v": (3.6, 1.2, f"v {keys} × {hidden}", ATTENTION),
        "attention": (5.1, 1.9, f"attention\n{size.heads} heads,\n{size.kv_heads} KV heads", ATTENTION),
        "o": (6.1, 1.0, f"o {hidden} × {queries}", ATTENTION),
        "norm 2": (7.1, 1.9, f"RMSNorm\ngain {hidden}", MLP),
        "gate": (8.3, 2.6, f"gate {inner} × {hidden}\nthen SiLU", MLP),
        "up": (8.3, 1.7, f"up {inner} × {hidden}", MLP),
        "times": (9.5, 2.1, "×", MLP),
        "down": (10.3, 1.2, f"down {hidden} × {inner}", MLP),
    }
    for chain in ARROWS:
        for start, end in zip(chain, chain[1:], strict=False):
            _arrow(ax, boxes[start][:2], boxes[end][:2])
    for x, name in ((2.3, "norm 1"), (7.1, "norm 2")):
        _arrow(ax, (x, 0), boxes[name][:2])
    for x, y, text, colour in boxes.values():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colour, "linewidth": 1.6}
        ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=3)
    ax.text(4.2, 3.2, "attention mixes positions", ha="center", color=ATTENTION)
    ax.text(8.7, 3.2, "the MLP works on each position alone", ha="center", color=MLP)
    ax.text(4.2, -0.35, f"residual stream: {hidden} numbers for each position", ha="center", color=STREAM)
    ax.set(xlim=(0, 13.7), ylim=(-0.7, 3.5), title=f"One layer adds twice to the residual stream; {size.layers} layers")
    ax.axis("off")
    return ax.get_figure()


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "0.6", "shrinkA": 0, "shrinkB": 0}, zorder=1)
