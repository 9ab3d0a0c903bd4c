"""What the factor model makes of texts: films before and after, by genre, and the neighbours of films that it has not seen.

    python -m experiments.transfer_pictures --out experiments/results/transfer.png

A fifth of the films, by hash, is left out of the fit: their vectors are what content gives an item that nobody has touched.

    I items, W numbers of a text's vector, K factors
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from experiments.data import TODAY
from experiments.evidence.measure import Mask
from experiments.evidence.pictures import save
from experiments.transfer_jobs import WORLDS
from limaml.config import Config, load
from limaml.events import catalogue
from limaml.events.ingest import ingest_history
from limaml.events.sources import open_source
from limaml.features.columns import Floats, vector_values
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.metrics import Ints
from limaml.schema import tables
from limaml.tasks.sampling import TaskRows
from limaml.training.prepare import read_history
from limaml.training.warm_start import fit_items
from limaml.transfer.embed_items import embed_items

_GENRES = ("Children's", "Horror", "Sci-Fi", "Documentary", "Romance", "Western")
_LEFT_OUT = 5
"""One item in so many."""
_SHOWN, _NEIGHBOURS, _TITLE = 4, 3, 34


@dataclass(frozen=True)
class Films:
    """The catalogue's films with events; one row a film."""

    titles: list[str]
    sets: list[set[str]]
    left_out_I: Mask
    num_rows_I: Ints
    text_IW: Floats
    """As the encoder made them."""
    content_IK: Floats
    """What the fitted factor model expects of a film's content."""


def films(cfg: Config) -> Films:
    """Embed, ingest and fit `cfg`'s world, MovieLens."""
    cfg, storage = WORLDS["movielens"].with_text(cfg), Storage(cfg.storage.root)
    embed_items(cfg, TODAY)
    through = open_source(cfg, TODAY).days()[-1]
    ingest_history(cfg, through, TODAY)
    logged, vectors = read_history(cfg, through), catalogue.item_vectors(storage, tables(cfg.features))
    assert vectors is not None
    ids = pc.unique(logged["item_id"])
    first = pc.index_in(ids, value_set=logged["item_id"].combine_chunks())
    left_out_I = np.array([crc32(item.encode()) % _LEFT_OUT == 0 for item in ids.to_pylist()])
    known = pc.is_in(logged["item_id"], value_set=ids.filter(pa.array(~left_out_I)))
    encoder = Encoder.fit(logged.filter(known), cfg, vectors).with_items(vectors)
    fitted = fit_items(TaskRows.of(logged.filter(known), encoder, cfg), cfg, encoder.dims)
    content = encoder.encode_table(logged.take(first)).item_features()[:, : encoder.dims.item_static]
    category = next(each.name for each in cfg.features if each.entity == "item" and each.type == "categories")
    items = catalogue.read(storage, "item")
    items = items.take(pc.index_in(ids, value_set=items["item_id"].combine_chunks()))
    text, _ = vector_values(
        vectors[cfg.transfer[0].feature].take(pc.index_in(ids, value_set=vectors["item_id"].combine_chunks()))
    )
    return Films(
        items["title"].to_pylist(),
        [set(values or ()) for values in items[category].to_pylist()],
        left_out_I,
        np.bincount(pc.index_in(logged["item_id"], value_set=ids).to_numpy()),
        text,
        (content @ fitted.content_weights_CK.numpy() + fitted.bias_K.numpy()).astype(np.float32),
    )


def neighbours(x_IW: Floats, items: Ints, count: int) -> Ints:
    """(len(items), count) the items that point most nearly where each of `items` does, from the mean; itself excepted."""
    centred = x_IW - x_IW.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(min=1e-12)
    cosine = unit[items] @ unit.T
    cosine[np.arange(len(items)), items] = -np.inf
    found: Ints = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    return found


def draw(found: Films) -> Figure:
    """Both spaces by PCA and by t-SNE, and below them neighbours."""
    figure: Figure = plt.figure(figsize=(9, 10.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 0.75))
    spaces = {"text": found.text_IW, "after the fit, from content alone": found.content_IK}
    methods = {"PCA": PCA(2, random_state=0), "t-SNE": TSNE(2, init="pca", random_state=0)}
    for (column, space), (row, method) in product(enumerate(spaces), enumerate(methods)):
        axis = figure.add_subplot(grid[row, column])
        x_I, y_I = methods[method].fit_transform(spaces[space]).T
        axis.scatter(x_I, y_I, s=3, color="lightgray")
        for place, genre in enumerate(_GENRES):
            mine = np.array([own & set(_GENRES) == {genre} for own in found.sets])
            axis.scatter(x_I[mine], y_I[mine], s=7, color=f"C{place}", label=genre)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{space}, {method}", fontsize=10)
        if row == column == 0:
            axis.legend(fontsize=7, markerscale=2)
    _table(figure.add_subplot(grid[2, :]), found)
    return figure


def _table(axis: Axes, found: Films) -> None:
    """Of the films left out those with the most rows, and their nearest among all the others."""
    items = np.flatnonzero(found.left_out_I)
    items = items[np.argsort(-found.num_rows_I[items], kind="stable")][:_SHOWN]
    columns = [neighbours(x_IW, items, _NEIGHBOURS) for x_IW in (found.text_IW, found.content_IK)]
    cells = [
        [found.titles[item][:_TITLE], *("\n".join(found.titles[at][:_TITLE] for at in near[place]) for near in columns)]
        for place, item in enumerate(items)
    ]
    axis.axis("off")
    table = axis.table(cells, colLabels=["not in the fit", "nearest by text", "nearest after the fit"], loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, _), cell in table.get_celld().items():
        cell.set_height(0.08 if row == 0 else 0.23)
        cell.get_text().set_horizontalalignment("left")
        cell.PAD = 0.02


def genre_share(found: Films, x_IW: Floats) -> float:
    """Share of the ten nearest of the films left out that have a genre in common with them."""
    items = np.flatnonzero(found.left_out_I)
    pairs = zip(items, neighbours(x_IW, items, 10), strict=True)
    return float(np.mean([bool(found.sets[item] & found.sets[at]) for item, near in pairs for at in near]))


def main(out: Annotated[Path, typer.Option(help="File of the picture.")]) -> None:
    """Draw, and say how often neighbours share a genre."""
    with TemporaryDirectory() as folder:
        found = films(load("configs/movielens.toml", [f"storage.root={folder}"]))
    save(draw(found), out)
    for name, x_IW in {"text": found.text_IW, "content": found.content_IK}.items():
        typer.echo(f"{name}: {genre_share(found, x_IW):.1%} of neighbours share a genre")


if __name__ == "__main__":
    typer.run(main)
