# SPDX-License-Identifier: Apache-2.0
"""Compression of a whole model: choose layers, gather statistics, factor, allocate, replace."""

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace as changed
from numbers import Real

import torch
from torch import Tensor, nn

from ..linalg.svd import check_integer
from .allocate import largest_rank, parameters, uniform_rank
from .calibrate import (
    Batch,
    Calibration,
    Masks,
    Objective,
    Progress,
    call_order,
    evaluating,
    modules_of,
    observing,
    rows,
    run,
    without_bias,
)
from .layers import STRUCTURED, Filter, Target, bias_of, find_targets, replace
from .memory import PeakMemory
from .monarch import projected
from .plan import Plan, allocate, counter, factored, make
from .report import CompressionReport, LayerReport, attach
from .sequential import fit_in_sequence, placing, stages_of
from .sparse_low_rank import decomposed

METHODS = ("svd", "fisher", "whitened", "monarch", "sparse_low_rank")
STRUCTURES = ("monarch", "sparse_low_rank")  # of uniform ranks only
WITHOUT_DATA = ("svd", *STRUCTURES)  # with uniform ranks, as well as with data
RANKS = ("uniform", "global")


def compress(
    model: nn.Module,
    keep: float = 0.6,
    *,
    method: str = "whitened",
    ranks: str = "uniform",
    sequential: bool = False,
    calibration: Iterable[Batch] | Callable[[], Iterable[Batch]] | None = None,
    objective: Objective | None = None,
    filter: Filter = None,
    iterations: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompressionReport:
    """Replaces a model's linear layers by structured ones, in place, without training.

    Every chosen ``nn.Linear`` (and ``Conv1D`` of transformers) with weight ``W (m, n)`` becomes a
    :class:`structmat.nn.LowRankLinear` with ``W' = U V`` of rank ``r``, ``r (m + n)`` weights;
    where that is no fewer than ``m n`` it stays dense. ``W'`` of that rank minimises

    - ``method="svd"``: ``||W - W'||_F``. Needs no data and loses most.
    - ``method="fisher"``: ``||(W - W') diag(f)^1/2||_F``, ``f`` the squared gradients of a loss
      (FWSVD; Hsu et al. 2022, arXiv:2207.00112).
    - ``method="whitened"``: ``E||W x - W' x||^2`` over the calibration data. ``W' = U_r U_r^T W``,
      ``U_r`` the top eigenvectors of ``W E[x x^T] W^T``: the optimum of SVD-LLM (Wang et al. 2024,
      arXiv:2403.07378) without its Cholesky factor and inverse.

    ``method="monarch"`` makes :class:`structmat.nn.MonarchLinear` of ``N x N`` blocks of rank
    ``R`` instead, ``N R (m + n)`` weights: the projection of ``W`` nearest in its output on the
    calibration data (to which 1 % of the mean input energy is added in every direction), or without
    data nearest to ``W``; see :func:`structmat.monarch.project`. ``N`` is the least count above one
    that divides m and n into blocks of multiples of 64, or else of 32, 16, 8 or 1; a layer whose
    sizes have no common divisor stays dense.

    ``method="sparse_low_rank"`` makes :class:`structmat.nn.SparseLowRankLinear`, ``W' = U V + S``
    with a quarter of the kept weights in ``U`` and ``V`` and the rest in ``S``, whose places are
    free: :func:`structmat.sparse_low_rank.decompose` under the same moments, or without data. The
    places take 2 bytes a weight of ``S``, which ``keep`` does not count.

    Call ``compress`` once a method, with a ``filter``, to mix structures in a model.

    ``ranks="uniform"`` gives each layer ``r = floor(keep m n / (m + n))``. ``ranks="global"``
    shares one budget by the predicted change of the model's output, ``tr(L E R E^T)`` with
    ``E = W - W'`` and ``L``, ``R`` from gradients of random projections of the output, taken on
    about 16,000 tokens of the calibration data; ``whitened`` factors then minimise that instead of
    the layer's own output error.

    Args:
        model: any module, on the CPU or CUDA, float64, float32, bfloat16 or float16.
        keep: kept fraction of the weights of the chosen layers, between 0 and 1.
        method: ``"svd"``, ``"fisher"``, ``"whitened"``, ``"monarch"`` or ``"sparse_low_rank"``.
        ranks: ``"uniform"`` or ``"global"``, which is for layers of low rank alone.
        sequential: then fit ``V`` anew, layer by layer in the order of the model, by regression of
            the layer's original outputs on the inputs it gets from the compressed layers before it.
            With ``whitened`` only.
        calibration: batches, or a function that returns them (called once a pass). A mapping is
            passed as keywords, a tuple or list as arguments, a tensor as the one argument; padding
            is left out by ``attention_mask``. Not needed for ``svd`` with uniform ranks,
            ``monarch`` and ``sparse_low_rank``.
        objective: ``objective(output, batch) -> tensor``. For ``global`` ranks the part of the
            model's output that counts, by default ``logits`` or ``last_hidden_state``, else the
            first tensor; for ``fisher`` the loss, by default the output's own ``loss``. With both
            it is the loss alone, and the ranks are for the default part of the output.
        filter: which layers: a pattern or patterns of names as in a shell (``"encoder.*"``), or
            ``filter(name, module) -> bool``; by default all but those whose weight is tied to
            something else, as to an embedding.
        iterations: of ``sparse_low_rank``, whose time they take, at most; by default those of
            :func:`structmat.sparse_low_rank.decompose`.
        seed: of the random projections.
        progress: ``progress(stage, done, total)``, called often.

    Returns:
        :class:`structmat.CompressionReport`: ranks, predicted and measured errors,
        spectra, time, memory. Print it, or take ``to_dict()``.

    Raises:
        ValueError: an option out of range; calibration missing, empty or not reaching a layer; no
            layer chosen, or none by one of the patterns; a chosen weight tied to a layer that
            stays; NaN or Inf in weights, activations or gradients; no loss for ``fisher``; a
            function's batches run out or differ in number; the compressed model fails on the first
            batch. The model is then as it was.
        TypeError: calibration is a single batch or holds texts; iterations is no integer.

    Cost: the data is read once for its hash, run once for the moments of each group of layers and
    once for the measured errors; for ``global`` and ``fisher`` a forward and backward over the
    16,000 tokens a group; then one SVD and up to two eigendecompositions in float64 a layer.
    ``sequential`` runs the original and the compressed model up to each layer in turn (with uniform
    ranks only that). Memory: the model, its factors (in its own dtype; for ``global`` ranks at the
    largest rank worth keeping, the size of the model), and float64 moments of a group of layers, at
    most 256 MiB or a quarter of the model (or those of one layer); for ``sequential`` those of one
    layer's inputs, twice ``(n, n)``. Activations are kept for one batch at most. The same data and
    seed give the same bytes on the same machine with the same number of threads.

    Example:
        >>> import torch, structmat as sm
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)
        ... )
        >>> data = [torch.randn(500, 8) @ torch.randn(8, 64) for _ in range(4)]
        >>> report = sm.compress(model, keep=0.5, calibration=data)
        >>> model[0]
        LowRankLinear(in_features=64, out_features=256, rank=25, bias=True)
        >>> 0.48 < report.kept <= 0.5
        True
    """
    started = time.perf_counter()
    _check_options(model, keep, method, ranks, sequential, calibration, iterations)
    keep = float(keep)
    tell = progress or (lambda stage, done, total: None)
    device = next(model.parameters()).device
    with PeakMemory(device) as memory, evaluating(model):
        targets = find_targets(model, filter)
        data = None if calibration is None else Calibration(calibration, model)
        if data is not None:
            targets = call_order(model, targets, data)
        stages = []
        if sequential and data is not None:
            some = [target for target in targets if largest_rank(*target.shape)]
            stages = stages_of(model, some, data)
        if method == "monarch":
            plans = projected(model, targets, data, keep, tell)
        elif method == "sparse_low_rank":
            plans = decomposed(model, targets, data, keep, iterations, seed, tell)
        elif sequential and ranks == "uniform":  # the ranks are all it takes
            plans = [Plan(target, rank=uniform_rank(*target.shape, keep)) for target in targets]
        else:
            plans = factored(model, targets, data, keep, method, ranks, objective, seed, tell)
            if ranks == "global":
                allocate(plans, keep)
            for plan in plans:
                if plan.factors is not None and not sequential:
                    make(plan, plan.factors)
                    plan.factors = None  # they take far more memory than the layers
        if sequential and data is not None:
            _refit(model, stages, plans, data, tell)
        elif data is not None:
            _measure(model, plans, data, tell)
        if data is not None:
            _try(model, plans, data)
    report = _finish(model, plans, data, method, ranks, sequential, keep, seed)
    report.seconds = time.perf_counter() - started
    report.peak_memory = memory.bytes
    return report


def compress_each(
    model: nn.Module,
    keeps: Sequence[float],
    *,
    method: str = "whitened",
    calibration: Iterable[Batch] | Callable[[], Iterable[Batch]],
    objective: Objective | None = None,
    filter: Filter = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[tuple[nn.Module, CompressionReport]]:
    """``compress(model, keep, ranks="global")`` of a copy of the model for each ``keep``.

    Statistics and factors, nearly all of the time, are made once: the first report's seconds have
    them. The model stays as it is.
    """
    for keep in keeps:
        _check_options(model, keep, method, "global", False, calibration)
    started = time.perf_counter()
    tell = progress or (lambda stage, done, total: None)
    with evaluating(model):
        data = Calibration(calibration, model)
        targets = call_order(model, find_targets(model, filter), data)
        plans = factored(model, targets, data, 0.0, method, "global", objective, seed, tell)
    results = []
    for keep in map(float, keeps):
        allocate(plans, keep)
        sized = [changed(plan, places={}) for plan in plans]
        with evaluating(model):
            for plan in sized:
                if plan.factors is not None:
                    make(plan, plan.factors)
            _measure(model, sized, data, tell)
            _try(model, sized, data)
        small = deepcopy(model)
        for plan in sized:  # the copy's own biases, shared as in the model
            for name, layer in plan.places.items():
                layer.bias = bias_of(small.get_submodule(name))  # type: ignore[assignment]
        report = _finish(small, sized, data, method, "global", False, keep, seed)
        report.seconds = time.perf_counter() - started
        results.append((small, report))
        started = time.perf_counter()
    return results


def _finish(
    model: nn.Module,
    plans: list[Plan],
    data: Calibration | None,
    method: str,
    ranks: str,
    sequential: bool,
    keep: float,
    seed: int,
) -> CompressionReport:
    """Puts the new layers into their places, and the report on the model."""
    for plan in plans:
        replace(model, plan.places)
    layers = [_report(plan) for plan in plans]
    report = CompressionReport(
        method=method,
        ranks=ranks,
        sequential=sequential,
        keep=keep,
        seed=seed,
        kept=sum(x.params_after for x in layers) / sum(x.params_before for x in layers),
        layers=layers,
        calibration_hash=None if data is None else data.hash,
        tokens=0 if data is None else data.tokens,
        seconds=0.0,
        peak_memory=None,
    )
    attach(model, report)
    return report


def _check_options(
    model: object,
    keep: object,
    method: str,
    ranks: str,
    sequential: bool,
    calibration: object,
    iterations: int | None = None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model must be an nn.Module, got {type(model).__name__}")
    if type(model) in (nn.Linear, *STRUCTURED):
        raise ValueError(
            "compress: the model is a linear layer itself, which has no place to be replaced in; "
            "use the from_linear of structmat.nn.LowRankLinear or MonarchLinear"
        )
    if next(model.parameters(), None) is None:
        raise ValueError("compress: the model has no parameters")
    if not isinstance(keep, Real) or not 0 < float(keep) < 1:
        raise ValueError(f"compress: keep must lie between 0 and 1, got {keep!r}")
    if method not in METHODS:
        raise ValueError(f"compress: method must be one of {', '.join(METHODS)}, got {method!r}")
    if ranks not in RANKS:
        raise ValueError(f"compress: ranks must be one of {', '.join(RANKS)}, got {ranks!r}")
    if ranks == "global" and method in STRUCTURES:
        raise ValueError(f"compress: method={method!r} has ranks='uniform' only, got 'global'")
    if sequential and method != "whitened":
        raise ValueError(f"compress: sequential goes with method='whitened', got {method!r}")
    if calibration is None and (method not in WITHOUT_DATA or ranks == "global"):
        raise ValueError(
            f"compress: method={method!r} with ranks={ranks!r} needs calibration, batches for the "
            f"model; only {', '.join(map(repr, WITHOUT_DATA))} with ranks='uniform' do without"
        )
    if iterations is None:
        return
    if method != "sparse_low_rank":
        raise ValueError(f"compress: iterations goes with method='sparse_low_rank', got {method!r}")
    check_integer("iterations", iterations, "compress")
    if iterations < 1:
        raise ValueError(f"compress: iterations is {iterations}, wanted at least 1")


def _refit(
    model: nn.Module,
    stages: list[list[Target]],
    plans: list[Plan],
    data: Calibration,
    tell: Progress,
) -> None:
    ranks = {plan.target: plan.rank for plan in plans if plan.rank is not None}
    first = {
        plan.target: plan.factors.head(plan.rank)
        for plan in plans
        if plan.factors is not None and plan.rank is not None
    }
    fits = fit_in_sequence(model, stages, ranks, first, data, tell)
    for plan in plans:
        plan.factors = None
        if plan.target in fits:
            plan.places, plan.error, plan.measured, plan.spectrum = fits[plan.target]


def _try(model: nn.Module, plans: list[Plan], data: Calibration) -> None:
    """One batch through the compressed model: some modules look into their ``nn.Linear``."""
    layers = {name: layer for plan in plans for name, layer in plan.places.items()}
    with torch.no_grad(), placing(model, layers):
        try:
            run(model, next(iter(data)))
        except Exception as error:
            raise ValueError(
                f"compress: the compressed model fails on the calibration data with "
                f"{type(error).__name__}: {error}; leave layers out by filter whose attributes, as "
                "weight, the model uses itself"
            ) from error


def _measure(model: nn.Module, plans: list[Plan], data: Calibration, tell: Progress) -> None:
    """Relative output errors of the new layers on the calibration data."""
    by_target = {plan.target: plan for plan in plans if plan.places}
    sums = {target: [0.0, 0.0] for target in by_target}

    def see(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> None:
        mask = masks.of(target)
        name = next(name for name, place in target.places.items() if place is module)
        difference = rows(by_target[target].places[name](x) - y, mask)
        bare = rows(without_bias(module, y), mask)
        sums[target][0] += difference.double().square().sum().item()
        sums[target][1] += bare.double().square().sum().item()

    step = counter("measure", data.batches, tell)
    with torch.no_grad(), observing(modules_of(by_target), see):
        for batch in data:
            masks = Masks(model, batch)
            run(model, batch)
            step()
    for target, (difference, whole) in sums.items():
        by_target[target].measured = (difference / whole) ** 0.5 if whole else 0.0


def _report(plan: Plan) -> LayerReport:
    m, n = plan.target.shape
    rank = plan.rank
    N = plan.blocks
    if rank is None:
        kind, after = "dense", m * n
    elif plan.nnz is not None:
        kind, after = "sparse_low_rank", parameters(m, n, rank) + plan.nnz
    else:
        kind, after = "low_rank" if N is None else "monarch", parameters(m, n, rank * (N or 1))
    errors = [] if rank is None or plan.error is None else plan.error[: rank + 1].tolist()
    losses = [] if rank is None or plan.loss is None else plan.loss[: rank + 1].tolist()
    return LayerReport(
        name=plan.target.name,
        places=list(plan.target.places),
        kind=kind,
        m=m,
        n=n,
        rank=rank,
        params_before=m * n,
        params_after=after,
        predicted_error=errors[-1] if errors else 0.0,
        measured_error=plan.measured,
        sensitivity=None if plan.loss is None else float(plan.loss[0]),
        spectrum=[] if rank is None or plan.spectrum is None else plan.spectrum.tolist(),
        errors=errors if kind == "low_rank" else [],
        loss=losses,
        seconds=plan.seconds,
        n_blocks=N,
        nnz=plan.nnz,
    )
