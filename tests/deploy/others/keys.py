"""Keys of another chart's values beside ours: `python keys.py THEIR_VALUES.yaml OUR_VALUES.yaml > CHART.json`.

What remains are names, at every level that ours touch; below what is null or empty any is free. README.md says
where they are from.
"""

import json
import sys
from pathlib import Path

import yaml


def beside(theirs, ours):
    """Their keys: below those that ours have too, the same; below others nothing."""
    return {
        key: beside(value, ours[key]) if isinstance(value, dict) and isinstance(ours.get(key), dict) else None
        for key, value in theirs.items()
    }


def main():
    theirs, ours = (yaml.safe_load(Path(path).read_text()) for path in sys.argv[1:])
    json.dump(beside(theirs, ours), sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
