# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a sentence encoder, compressed and measured."""
