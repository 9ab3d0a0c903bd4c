"""Checkov, a scanner of manifests, on the production variant: what it has against it is known, and said here why."""

import json
import subprocess

import pytest

from tests.deploy.charts import KUBERNETES, ROOT, template, values_of

pytestmark = pytest.mark.services

CHECKOV = ROOT / "tests" / ".checkov" / "bin" / "checkov"
ACCEPTED = {
    "CKV_K8S_8": "The pod of `helm test` ends by itself.",
    "CKV_K8S_9": "So it is never ready.",
    "CKV_K8S_11": "A limit of processor time stalls requests while the node is idle; memory has one.",
    "CKV_K8S_21": "Objects carry no namespace, Helm puts them where it is told; checkov takes that for `default`.",
    "CKV_K8S_35": "The configuration's ${NAME} and boto3 read environment variables; the service's token is a file.",
}


def failed(manifest, folder):
    """Check -> resources that it fails for."""
    assert CHECKOV.exists(), f"checkov must be installed in {CHECKOV.parents[1]}; run make tests/.checkov/installed"
    path = folder / "manifest.yaml"
    path.write_text(manifest)
    done = subprocess.run(
        [CHECKOV, "--framework", "kubernetes", "--file", path, "--output", "json", "--skip-download"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 100, done.stderr
    found = {}
    for one in report["results"]["failed_checks"]:
        found.setdefault(one["check_id"], []).append(one["resource"])
    return found


def test_the_scanner_finds_what_is_accepted_and_nothing_else(tmp_path):
    manifest = template("--values", values_of("production"), "--kube-version", KUBERNETES[-1]).stdout
    found = failed(manifest, tmp_path)
    assert set(found) == set(ACCEPTED), {check: found[check] for check in set(found) - set(ACCEPTED)}
    assert all("test-rank" in resource for check in ("CKV_K8S_8", "CKV_K8S_9") for resource in found[check])
    writable = manifest.replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false")
    assert "CKV_K8S_22" in failed(writable, tmp_path)
