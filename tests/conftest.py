"""Flags and the table of claims, shared by all tests."""

from __future__ import annotations

import pytest

from .claims import FOLDER, Table, measured, whole

__all__ = ["measured"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files; read the diff after")
    parser.addoption("--write-claims", action="store_true", help="bring docs/claims.* up to date")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-claims") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(FOLDER, whole(config)), "claims")
