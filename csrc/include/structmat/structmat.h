// SPDX-License-Identifier: Apache-2.0
// Everything public.
#pragma once
#include "structmat/activation.h"
#include "structmat/block_svd.h"
#include "structmat/context.h"
#include "structmat/error.h"
#include "structmat/info.h"
#include "structmat/kronecker_sparse.h"
#include "structmat/linalg.h"
#include "structmat/low_rank.h"
#include "structmat/matrix.h"
#include "structmat/monarch.h"
#include "structmat/out_of_core.h"
#include "structmat/random.h"
#include "structmat/sparse_low_rank.h"
#include "structmat/sparse_pattern.h"
#include "structmat/streaming_svd.h"
#include "structmat/svd.h"
