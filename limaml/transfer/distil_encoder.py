"""The verb `distil-encoder`."""

from pathlib import Path
from typing import Any

from limaml.transfer.bert import BertEncoder, minilm
from limaml.transfer.encoders import require_there
from limaml.transfer.static import distil


def distil_encoder(out: Path, teacher: Path | None) -> dict[str, Any]:
    """Leave a static encoder in `out` and say what to declare. Raises ConfigError if there is no such teacher."""
    origin = distil(minilm() if teacher is None else BertEncoder(require_there(str(teacher), "the folder of an encoder")), out)
    print(f'provider = "static", path = "{out}"; of the feature:')
    print(f'width = {origin.width}, encoder = "{origin.label}", licence = "{origin.licence}"')
    return {"encoder": origin.label, "width": origin.width, "licence": origin.licence, "path": str(out)}
