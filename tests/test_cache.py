"""The cache folder."""

from __future__ import annotations

import os

import pytest

from fedexp import cache
from fedexp.errors import UserError


def test_cache_folder_defaults_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDEXP_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fedexp"
    assert cache.folder().is_dir()


def test_a_cache_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot create .*file/cache.*FEDEXP_CACHE"):
        cache.folder()
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # As root, modes do not bind.
    with pytest.raises(UserError, match=r"read-only.*FEDEXP_CACHE"):
        cache.folder()
