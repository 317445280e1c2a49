"""Flags and the table of claims, shared by all tests."""

from __future__ import annotations

import pytest

from .claims import FOLDER, Table, measured, whole

__all__ = ["measured"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files; read the diff after")


def pytest_configure(config: pytest.Config) -> None:
    if whole(config):
        config.pluginmanager.register(Table(FOLDER), "claims")
