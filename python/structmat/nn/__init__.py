# SPDX-License-Identifier: Apache-2.0
"""Layers with structured weights, drop-in for nn.Linear."""

__all__: list[str] = []
