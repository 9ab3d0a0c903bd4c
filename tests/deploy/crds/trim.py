"""Trims a published CustomResourceDefinition to what a test needs: `python trim.py KIND < upstream.yaml > KIND.yaml`.

What remains is the schema of the version that is stored, without descriptions. A pod's template becomes `x-pod-template: true`:
the tests hold it to Kubernetes' own schema of a Pod, which is stricter. README.md says where each came from.
"""

import sys

import yaml

DROPPED = (
    "description",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-map-type",
    "x-kubernetes-validations",
)


def trimmed(schema):
    """The schema, and those below it, without what is dropped."""
    properties = schema.get("properties", {})
    if "containers" in properties.get("spec", {}).get("properties", {}):
        return {"type": "object", "x-pod-template": True}
    kept = {key: value for key, value in schema.items() if key not in DROPPED}
    if properties:
        kept["properties"] = {name: trimmed(below) for name, below in properties.items()}
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = trimmed(kept[key])
    return kept


def main():
    kind = sys.argv[1]
    for definition in yaml.safe_load_all(sys.stdin):
        if definition and definition["spec"]["names"]["kind"] == kind:
            (version,) = (version for version in definition["spec"]["versions"] if version["storage"])
            api_version = f"{definition['spec']['group']}/{version['name']}"
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"].pop("status", None)
            yaml.safe_dump({"apiVersion": api_version, **trimmed(schema)}, sys.stdout, width=200)
            return
    sys.exit(f"no definition of {kind} in what was given")


if __name__ == "__main__":
    main()
