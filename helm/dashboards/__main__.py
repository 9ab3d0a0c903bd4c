"""Write `<folder>/{freshness,serving,pipeline}.json`; the same code writes the same bytes (`make dashboards`)."""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from helm.dashboards.boards import BOARDS

FOLDER = Path(__file__).parents[1] / "limaml" / "files" / "dashboards"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in BOARDS.items():
        text = json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
