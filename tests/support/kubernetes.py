"""Kubernetes manifests, as far as files can be checked."""

from __future__ import annotations

from pathlib import Path

import pytest


def manifests(file: Path) -> dict[str, dict]:
    """Kind -> manifest."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(file.read_text())}


def validate(manifest: dict, version: str) -> None:
    """Holds it to Kubernetes' own schema of a version, or of the latest one that is known."""
    schema = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    if version == "latest":
        version = schema.latest_version()
    schema.validate(manifest, version, strict=True)
