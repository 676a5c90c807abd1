# SPDX-License-Identifier: Apache-2.0
from structmat_config import main

main()
