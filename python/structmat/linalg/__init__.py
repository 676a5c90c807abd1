# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

__all__: list[str] = []
