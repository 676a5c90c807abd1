# SPDX-License-Identifier: Apache-2.0
"""``python -m structmat``: the command line."""

from structmat.cli import main

main()
