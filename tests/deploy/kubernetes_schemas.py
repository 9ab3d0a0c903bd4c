"""Run in tests/.deploy: objects as JSON on standard input, a version of Kubernetes; a line for each that its schema refuses."""

import functools
import json
import sys

from kubernetes_validate import SchemaNotFoundError, ValidationError, utils, validate


def main():
    # A schema has megabytes, and is read again for each object.
    utils.schema_contents = functools.cache(utils.schema_contents)
    wrong, seen = [], set()
    for one in json.load(sys.stdin):
        if (text := json.dumps(one, sort_keys=True)) in seen:
            continue
        seen.add(text)
        try:
            validate(one, sys.argv[1], strict=True)
        except (ValidationError, SchemaNotFoundError) as error:
            wrong.append(f"{one['kind']}/{one['metadata'].get('name')}: {error}"[:2000])
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()
