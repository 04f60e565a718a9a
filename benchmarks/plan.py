"""How much is run: everything, or enough in three minutes to see that all of it works."""

from dataclasses import dataclass

from benchmarks.requests import Shape

SMALL, MIDDLE, WIDE, HUGE = Shape(64, 10), Shape(384, 384), Shape(768, 768), Shape(4096, 4096)
RANK = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """One mode's amounts; all times in seconds."""

    engine_shapes: tuple[Shape, ...]
    engine_repetitions: int
    service_shapes: tuple[Shape, ...]
    """Every server is measured on these."""
    more_service_shapes: tuple[Shape, ...]
    """Only loraplex, the limit and FastAPI on these, with 16 connections."""
    connections: dict[int, int]
    """Of the load generator → rounds."""
    more_rounds: int
    """On the further layers."""
    load_seconds: float
    side_load_seconds: float
    """With other numbers of connections than 16, the one that the bars are about."""
    tenants: int
    many_tenants: int
    training_rounds: int
    training_seconds: float
    overload_rounds: int
    overload_seconds: float
    starts: int
    cold_loads: int
    fit_rounds: int
    fleet_groups: int
    large_fleet_groups: int
    plain_fits: int
    """Of the fleet's, one after the other in plain torch."""
    fits_alone: int
    """Groups that are trained again as jobs of their own."""
    quality_seeds: int
    """Of each world, and of each table with many rows."""
    key_pairs: int
    tenant_rounds: int
    tenant_seconds: float


FULL = Plan(
    engine_shapes=(SMALL, MIDDLE, WIDE, HUGE),
    engine_repetitions=25,
    service_shapes=(SMALL, WIDE),
    more_service_shapes=(MIDDLE, HUGE),
    connections={16: 4, 1: 2, 64: 2},
    more_rounds=2,
    load_seconds=3,
    side_load_seconds=2,
    tenants=1_000,
    many_tenants=10_000,
    training_rounds=4,
    training_seconds=10,
    overload_rounds=3,
    overload_seconds=8,
    starts=3,
    cold_loads=1_000,
    fit_rounds=3,
    fleet_groups=1_000,
    large_fleet_groups=10_000,
    plain_fits=1_000,
    fits_alone=40,
    quality_seeds=2,
    key_pairs=24,
    tenant_rounds=12,
    tenant_seconds=8,
)
QUICK = Plan(
    engine_shapes=(SMALL, WIDE),
    engine_repetitions=7,
    service_shapes=(WIDE,),
    more_service_shapes=(SMALL,),
    connections={16: 1},
    more_rounds=1,
    load_seconds=1,
    side_load_seconds=1,
    tenants=1_000,
    many_tenants=2_000,
    training_rounds=1,
    training_seconds=5,
    overload_rounds=1,
    overload_seconds=4,
    starts=1,
    cold_loads=300,
    fit_rounds=1,
    fleet_groups=1_000,
    large_fleet_groups=2_000,
    plain_fits=200,
    fits_alone=8,
    quality_seeds=1,
    key_pairs=3,
    tenant_rounds=2,
    tenant_seconds=4,
)
