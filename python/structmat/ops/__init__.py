# SPDX-License-Identifier: Apache-2.0
"""Products of structured matrices."""

__all__: list[str] = []
