"""What `--weights` does to a job: one precision for every layer, on top of kinds and ranks that a method chooses."""

from collections.abc import Callable
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError
from rankwise.plan import LayerSpec, RankPlan
from rankwise.storage import Precision, require_native

if TYPE_CHECKING:
    from rankwise.alloc.methods.base import Method
    from rankwise.config import CompressConfig

AUTO = "auto"  # the model's own dtype
GROUP = 64  # of int4 unless the user says otherwise


def make_precision(weights: str, group: int | None, asymmetric: bool) -> Precision | None:
    """A precision from the command line's options; None for `auto`.

    Raises:
        RankwiseError: unknown weights, or options that do not belong to them.
    """
    if weights == AUTO:
        for field, value in {"group": group, "asymmetric": asymmetric or None}.items():
            if value is not None:
                raise RankwiseError(field, value, "allowed: with --weights int4")
        return None
    return Precision(weights, GROUP if weights == "int4" and group is None else group, asymmetric)


def raised(method: "Method", precision: Precision) -> "Method":
    """The method with a rank multiple that whole groups make up: ranks are the reduction of second factors."""
    raised = replace(method, rank_multiple=lcm(method.rank_multiple, precision.block))
    more: dict[str, Any] = {"channel_multiple": lcm(method.width_multiple, precision.block)}
    return replace(raised, **more) if method.width_multiple else raised  # what layers read is in groups, too


def require_fit(precision: Precision, shapes: dict[str, tuple[int, int]], dtype: str) -> None:
    """Raise a RankwiseError unless a model's layers, of these (out, in) and in this dtype, can be stored so."""
    require_native(precision.weights, dtype)
    for name, (_, in_features) in shapes.items():
        try:
            precision.require_blocks("in_features", in_features)
        except RankwiseError as error:
            raise RankwiseError(f"{name}.{error.field}", error.value, error.allowed) from None


def needs_curvature(config: "CompressConfig", given: RankPlan | None) -> bool:
    """False where every layer stays dense and is only rounded to the nearest codes: then there is nothing to measure.

    Arguments are those of `needs_factors`.
    """
    return needs_factors(config, given) or config.feeds_back


def needs_factors(config: "CompressConfig", given: RankPlan | None) -> bool:
    """False where every layer stays dense and is only rounded.

    Args:
        config: the command.
        given: the plan that it is to carry out, or None.
    """
    if given is not None:
        return any(spec.kind != "dense" or spec.dense_shape for _, spec in given) or not given.quantised
    rounds = config.precision is not None and config.precision.quantised
    if config.budget is not None:
        return True
    return not rounds or config.scores is not None or config.method.ratio < 1 or "dense" not in config.method.kinds


def rounding_plan(
    given: RankPlan | None,
    precision: Precision | None,
    shapes: dict[str, tuple[int, int]],
    dtype: str,
    keep: Callable[[str], bool] | None = None,
) -> RankPlan:
    """The plan where `needs_factors` is False.

    Args:
        given: the plan to carry out, or None: every layer stays dense, in one precision.
        precision: that one.
        shapes: the layers' (out, in).
        dtype: of its numbers that are not rounded.
        keep: names of layers that are not.
    """
    if given is not None:
        plain = Precision(dtype)
        return RankPlan({name: spec if spec.quantised else spec.stored_as(plain) for name, spec in given})
    layers = {name: LayerSpec("dense", m, n, min(m, n)) for name, (m, n) in shapes.items()}
    return RankPlan(layers).stored_as(Precision(dtype)).stored_as(precision or Precision(dtype), keep)
