# SPDX-License-Identifier: Apache-2.0
"""scikit-build-core, plus one rule: ask for torch only where the environment has none.

The bindings need torch's headers, which `torch` alone ships. Listing it in build-system.requires
would make every isolated build download a CUDA torch next to the one already installed.
"""

import sysconfig
from pathlib import Path

from scikit_build_core import build as _base
from scikit_build_core.build import *  # noqa: F403  (the PEP 517 hooks)

_HEADER = Path("torch", "include", "torch", "csrc", "stable", "library.h")


def _torch_if_missing() -> list[str]:
    roots = {sysconfig.get_path("platlib"), sysconfig.get_path("purelib")}
    return [] if any((Path(root) / _HEADER).exists() for root in roots) else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return _base.get_requires_for_build_wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return _base.get_requires_for_build_editable(config_settings) + _torch_if_missing()
